"""Put `data/` and `docs/results/` into the wheel as `moe_lab/_data`; an editable install reads them where they are."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class DataHook(BuildHookInterface):
    """Adds the shipped traces, weights and measurements to a wheel."""

    def initialize(self, version, build_data):
        if version == "standard":
            build_data["force_include"] |= {"data": "moe_lab/_data", "docs/results": "moe_lab/_data/results"}
