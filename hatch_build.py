"""Put `data/` into the wheel as `moe_lab/_data`; an editable install reads it where it is."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class DataHook(BuildHookInterface):
    """Adds the shipped traces and weights to a wheel."""

    def initialize(self, version, build_data):
        if version == "standard":
            build_data["force_include"]["data"] = "moe_lab/_data"
