"""Methods as values: what each changes in a layer and a training, and that its text says where it is from."""

import pytest

from moe_lab import MoEConfig
from moe_lab.study.balancing import METHODS, method

BASE = MoEConfig(dim=8, hidden_dim=8, num_experts=4, top_k=2, load_balance_coeff=0.5, capacity_factor=2.0)
PLAIN = BASE.replace(load_balance_coeff=None, capacity_factor=None)
LIVE = [name for name in METHODS if name != "expert choice"]


@pytest.mark.parametrize("name", LIVE)
def test_a_method_replaces_the_balancing_of_a_layer_and_nothing_else(name):
    config = method(name).config(BASE)
    undone = config.replace(
        router=PLAIN.router, **{n: getattr(PLAIN, n) for n in ("load_balance_coeff", "bias_centred", "capacity_factor")}
    ).replace(drop_policy=PLAIN.drop_policy, drop_order=PLAIN.drop_order)
    assert undone == PLAIN
    assert (config == PLAIN) == (name in ("none", "z-loss") or name.startswith("switch"))


def test_methods_are_different_settings():
    seen = {(method(name).config(BASE), *method(name).losses().items()) for name in LIVE}
    assert len(seen) == len(LIVE)


def test_a_coefficient_goes_where_it_belongs():
    assert method("bias").config(BASE, 0.2).load_balance_coeff == 0.2
    assert not method("bias, not centred").config(BASE).bias_centred
    assert method("capacity, slot-major").config(BASE, 1.5).capacity_factor == 1.5
    assert method("jitter").config(BASE, 0.3).router.jitter == 0.3
    assert method("switch, global").losses(0.7) == {"global_coeff": 0.7}
    assert method("switch, hf").losses() == {"hf_coeff": 0.01}
    assert method("bias").losses() == {}


def test_what_cannot_run_and_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="choose_by='expert_choice' is for recorded logits only"):
        method("expert choice").config(BASE)
    with pytest.raises(ValueError, match="method='magic' is not known: choose one of 'none'"):
        method("magic")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_its_source(name):
    assert method(name).source
    assert method(name).acts in ("nothing", "choice", "loss", "drops", "noise")
