"""Run in a process of its own, as the checks of shapes in signatures cannot be compiled."""

import torch

from moe_lab import MoE, MoEConfig
from moe_lab.jobs.bench_inputs import relative_error


def main():
    """Inductor makes one graph of a fused layer with its router, whatever the routing; output and gradients hold."""
    config = MoEConfig(dim=256, hidden_dim=136, num_experts=8, top_k=2, num_shared_experts=1, backend="fused")
    torch.manual_seed(0)
    moe = MoE(config).to("cuda", torch.bfloat16)
    low, exact = (MoE(config.replace(backend="loop")).to("cuda", dtype) for dtype in (torch.bfloat16, torch.float64))
    for other in (low, exact):
        other.load_state_dict(moe.state_dict())
    compiled = torch.compile(moe, fullgraph=True, dynamic=False)
    x_TD = torch.randn(300, config.dim, device="cuda", dtype=torch.bfloat16)
    compiled(x_TD)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens_TD in (x_TD, x_TD.flip(1)):
            results = []
            for layer, inputs_TD in ((compiled, tokens_TD), (low, tokens_TD), (exact, tokens_TD.double())):
                out_TD = layer(inputs_TD)
                weights = [p for p in layer.parameters() if p.requires_grad]
                results.append([out_TD, *torch.autograd.grad(out_TD.float().square().sum(), weights)])
            for name, got, own, right in zip(("out", *dict(moe.named_parameters())), *results):
                assert relative_error(got, right) <= 2 * relative_error(own, right), name


if __name__ == "__main__":
    main()
