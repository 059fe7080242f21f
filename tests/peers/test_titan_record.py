"""Recording routers of torchtitan: what is kept is what they chose, and logits that lead there again."""

import pytest
import torch

from moe_lab import RouterConfig, record
from moe_lab.models import titan

moe = pytest.importorskip("torchtitan.models.common.moe")
Linear = pytest.importorskip("torchtitan.models.common.linear").Linear
D, E, K = 16, 8, 3


class Model(torch.nn.Module):
    def __init__(self, **settings):
        super().__init__()
        gate = Linear.Config(in_features=D, out_features=E)
        self.router = moe.TokenChoiceTopKRouter.Config(num_experts=E, top_k=K, gate=gate, **settings).build()
        torch.nn.init.normal_(self.router.gate.weight)
        self.bias_E = torch.randn(E) / 10

    def forward(self, x_BLD):
        self.seen = self.router(x_BLD, self.bias_E)
        return self.seen[0]


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize(
    "settings",
    [
        {"score_func": "softmax"},
        {"score_func": "sigmoid", "route_norm": True, "route_scale": 2.5},
        {"score_func": "sigmoid", "num_expert_groups": 4, "num_limited_groups": 2},
    ],
)
def test_what_is_recorded_is_what_was_chosen_and_its_logits_lead_there(settings, recwarn):
    model = Model(**settings)
    with record(model) as recorder, torch.no_grad():
        model(torch.randn(2, 50, D))
    trace = recorder.trace()
    gates, ids, scores = (part.flatten(0, 1) for part in model.seen)
    assert trace.info.router == RouterConfig(**settings)
    assert torch.equal(trace.expert_bias_LE[0], model.bias_E)
    assert torch.equal(trace.expert_ids_LTK[0].long().sort().values, ids.sort().values)
    assert torch.equal(trace.gates_LTK[0].sort().values, gates.half().sort().values)
    logits_TE = trace.logits_LTE[0].float()
    again = logits_TE.softmax(-1) if settings["score_func"] == "softmax" else logits_TE.sigmoid()
    torch.testing.assert_close(again, scores, rtol=2**-7, atol=2**-10)
    same = trace.reroute(0, trace.info.router, K).expert_ids_TK.sort().values == ids.sort().values
    assert same.all(dim=1).float().mean() > 0.95, "near ties of float16 aside"
    assert not [w for w in recwarn if "routes like no RouterConfig" in str(w.message)]


def test_scores_that_rounded_away_have_finite_logits():
    scores_TE = torch.tensor([[0.0, 1.0, 0.5]])
    for score_func in ("softmax", "sigmoid"):
        logits_TE = titan.logits_of(scores_TE, score_func)
        assert logits_TE.half().isfinite().all()
        assert logits_TE.argsort().tolist() == [[0, 2, 1]]


def test_a_router_that_returns_something_else_is_refused():
    router = Model().router
    with pytest.raises(ValueError, match=r"returned last dimensions \[\(3,\), \(8,\)\]: expected gates and ids of 3"):
        titan.decision(router, (torch.zeros(2, 3), torch.zeros(2, 8)))
