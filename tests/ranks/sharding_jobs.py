"""What ranks run for tests of sharded training: results are whole tensors, from rank 0."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moe_lab import MoE, fastpaths
from moe_lab.models.lm import LMConfig, MoELM, rotary_table
from moe_lab.parallel.ordered import OrderedReduceScatter, reduce_scatter
from moe_lab.parallel.sequence import MeshShard
from moe_lab.parallel.sharding import (
    ShardedExperts,
    clip_grad_norm,
    make_mesh,
    moe_layers,
    shard_moe,
    update_biases,
)


def batch(config, size=8, length=None):
    bytes_BL = torch.randint(256, (size, config.max_length + 1), generator=torch.Generator().manual_seed(3))
    return bytes_BL[:, : 1 + (length or config.max_length)]


def loss_of(model, bytes_BL):
    logits_BLV = model(bytes_BL[:, :-1])
    logits = logits_BLV.flatten(0, 1).to(torch.promote_types(logits_BLV.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, bytes_BL[:, 1:].flatten())


def loss_of_positions(model, bytes_BL, mesh):
    """Of this rank's positions; the mean over ranks is that over all tokens."""
    part = MeshShard.of(mesh, len(bytes_BL), bytes_BL.shape[1] - 1)
    logits_tV = part.real(model(part.cut(bytes_BL[:, :-1]), part))
    targets_t = bytes_BL[:, 1:].flatten()[part.index_T[part.valid_T]]
    summed = torch.nn.functional.cross_entropy(logits_tV, targets_t, reduction="sum")
    return summed * part.size / bytes_BL[:, 1:].numel()


def build(config, dtype=torch.float32):
    torch.manual_seed(0)
    return MoELM(config).to(dtype).train()


def one_process(config, micro=1, dtype=torch.float32, autocast=None, length=None):
    """Loss, gradients, biases of one step."""
    model = build(config, dtype)
    weights = dict(model.named_parameters())
    if autocast:
        weights = {name: p if ".router." in name else p.to(autocast) for name, p in weights.items()}
    losses = []
    for part in batch(config, length=length).chunk(micro):
        logits_BLV = torch.func.functional_call(model, weights, (part[:, :-1],))
        logits = logits_BLV.flatten(0, 1).to(torch.promote_types(logits_BLV.dtype, torch.float32))
        losses.append(torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten()))
        (losses[-1] / micro).backward(retain_graph=autocast is not None)
    counts = [moe.tokens_per_expert_E.clone() for moe in model.moe_layers]
    for moe in model.moe_layers:
        moe.update_expert_bias()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return (
        sum(losses).item() / micro,
        grads,
        torch.stack(counts),
        torch.stack([m.expert_bias_E for m in model.moe_layers]),
    )


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(config: LMConfig, ep, sp=1, micro=1, dtype=torch.float32, rounded=None, checkpointing=False, length=None):
    """The same on the ranks of this pool."""
    model = build(config, dtype)
    mesh = make_mesh(ep, sp)
    dp, _, ep = mesh.get_coordinate()
    shard_moe(model, mesh, dtype=rounded, checkpointing=checkpointing)
    routed = []
    for moe in moe_layers(model):
        moe.router.register_forward_hook(lambda router, args, routing: routed.append(routing.expert_ids_TK))
    losses = []
    for part in batch(config, length=length).chunk(micro):
        mine = part.chunk(dist.get_world_size() // sp)[dp * mesh["ep"].size() + ep]
        losses.append(loss_of(model, mine) if sp == 1 else loss_of_positions(model, mine, mesh["sp"]))
        (losses[-1] / micro).backward()
    loss = sum(losses).detach() / micro
    dist.all_reduce(loss)
    counts_LE = update_biases(model, mesh)
    grads = {name: whole(p.grad) for name, p in model.named_parameters()}
    bias = torch.stack([moe.expert_bias_E for moe in moe_layers(model)])
    result = loss.item() / dist.get_world_size(), grads, counts_LE, bias, routed
    return result if dist.get_rank() == 0 else None


def placements(config: LMConfig, ep, sp=1):
    """Placement and local shape of one weight of each kind."""
    model = shard_moe(build(config), make_mesh(ep, sp))
    names = ("w1_EFD", "w2_EDF", "w3_EFD")
    found = {name: getattr(model.blocks[0].moe.experts, name) for name in names}
    found["qkv"] = model.blocks[0].attention.qkv.weight
    found["gate"] = model.blocks[0].moe.router.gate.weight
    return {
        name: (str(p.placements), tuple(p.device_mesh.shape), tuple(p.to_local().shape)) for name, p in found.items()
    }


def groups_after_each(config: LMConfig, ep, sp):
    """How many process groups there are after each of three models."""
    found = []
    for _ in range(3):
        model = shard_moe(build(config), make_mesh(ep, sp))
        loss_of(model, batch(config)[:1]).backward() if sp == 1 else None
        found.append(len(dist.distributed_c10d._world.pg_map))
    return found


def weights_in_use(config: LMConfig, ep, rounded):
    """Dtypes of a gate's and of a dense weight while the model runs, of a block's hidden states and rotary table."""
    model = shard_moe(build(config), make_mesh(ep), dtype=rounded)
    gate, dense, seen = model.blocks[0].moe.router.gate, model.blocks[0].attention.qkv, []
    router = model.blocks[0].moe.router
    router.register_forward_pre_hook(lambda *args: seen.extend([gate.weight.dtype, dense.weight.dtype]))  # once whole
    model.blocks[1].attention.register_forward_pre_hook(lambda _, args: seen.extend(given.dtype for given in args[:2]))
    model(batch(config)[:, :-1])
    return seen


class Widened(torch.nn.Module):
    """Hands a unit hidden states in float32, whatever it is given."""

    def __init__(self, unit):
        super().__init__()
        self.unit = unit

    def forward(self, x_BLD, rotary):
        return self.unit(x_BLD.float(), rotary)


def hidden_in_float32(config: LMConfig, rounded):
    """The dtype in which a block answers to them."""
    model = shard_moe(Widened(build(config).blocks[0]), make_mesh(2), dtype=rounded)
    width = config.moe.dim
    rotary = rotary_table(4, width // config.num_heads, torch.device("cpu"))
    return model(torch.randn(2, 4, width), rotary).dtype


def without_sequences(config: LMConfig, ep):
    """The same gradients over a mesh (dp, ep) of the caller's."""
    model = build(config)
    size = dist.get_world_size()
    shard_moe(model, init_device_mesh("cpu", (size // ep, ep), mesh_dim_names=("dp", "ep")))
    loss_of(model, batch(config).chunk(size)[dist.get_rank()]).backward()
    return {name: whole(p.grad) for name, p in model.named_parameters()}


def misnamed(config: LMConfig):
    shard_moe(build(config), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")))


def differing(config: LMConfig):
    shard_moe(build(config), make_mesh(2), checkpointing=dist.get_rank() == 3)


def clipped(config: LMConfig, ep, max_norm):
    """The norm before clipping, and the gradients after."""
    model = shard_moe(build(config), make_mesh(ep))
    loss_of(model, batch(config).chunk(dist.get_world_size())[dist.get_rank()]).backward()
    norm = clip_grad_norm(model.parameters(), max_norm).item()
    return norm, {name: whole(p.grad) for name, p in model.named_parameters()}


def summed_in_order():
    """This rank's element of a sum that float32 rounds to other numbers in other orders, as each asks for it."""
    mine = [1e8, 1.0, -1e8, 2.0][dist.get_rank()]
    x_R1 = torch.full((dist.get_world_size(), 1), mine)
    out_1 = torch.empty(1)
    OrderedReduceScatter()(output_tensor=out_1, input_tensor=x_R1.flatten(), group=dist.group.WORLD, op=None)
    part = MeshShard(1, len(x_R1), len(x_R1), dist.get_rank(), dist.group.WORLD, fixed_order=True)
    key_11 = torch.zeros(1, 1, requires_grad=True)
    part.gather(key_11).backward(x_R1)
    return reduce_scatter(x_R1, dist.group.WORLD).item(), out_1.item(), key_11.grad.item()


def layer_alone(config, ep):
    """Outputs of a sharded layer, and of the same layer on one rank."""
    torch.manual_seed(0)
    moe = MoE(config)
    x_TD = torch.randn(5 + dist.get_rank(), config.dim)
    expected = moe(x_TD).detach()
    return shard_moe(moe, make_mesh(ep))(x_TD).detach(), expected


def alternated(config, ep, rounds=3):
    """Training steps by `loop`, two forwards by `batched` after each: outputs beside those of a fresh layer of the same
    weights, what the record says of kept copies, and bytes kept.
    """
    torch.manual_seed(0)
    moe = shard_moe(MoE(config), make_mesh(ep))
    experts = moe.experts.products[0] if isinstance(moe.experts, ShardedExperts) else moe.experts
    optimizer = torch.optim.SGD(moe.parameters(), lr=1.0)
    x_TD = torch.randn(2 * config.num_experts, config.dim, generator=torch.Generator().manual_seed(dist.get_rank()))
    pairs = []
    with fastpaths.record() as record:
        for _ in range(rounds):
            experts.backend = "loop"
            moe.train()(x_TD).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            experts.backend = "batched"
            weights = {name: whole(value) for name, value in moe.state_dict().items()}
            fresh = MoE(config)
            fresh.load_state_dict(weights)
            with torch.no_grad():
                pairs += [(moe.eval()(x_TD), fresh.eval()(x_TD)) for _ in range(2)]
    kept = {name: entry.reasons for name, entry in record.entries.items() if name.startswith("cached_")}
    return pairs, kept, record.count("batched_no_grad_experts"), experts.cache.num_bytes
