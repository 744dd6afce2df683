"""What this machine could reach with a recipe, what it reaches, and what would help.

Each printed line says where its numbers come from: they are measured here (training/probe.py),
computed from those by a roofline, or computed from vendors' datasheets. The roofline is

    seconds of a step = flops / matmul rate + bytes of everything else / copy rate

Its two terms do not overlap; launches, waiting and small matrices are not in it. `findings` is a
pure function, so that it can be tested for other machines on this one.
"""

import platform
from dataclasses import replace

import torch

from kernels import EAGER
from kernels.reference import CHUNK_TOKENS
from model.flops import flops_per_token, num_parameters
from training.data import Tokens
from training.environment import environment
from training.machines import CARDS, mfu
from training.plan import Machine, Plan
from training.probe import Probe, Rates, measure_rates, probe_steps, products_s
from training.recipes import Recipe


def traffic_bytes(recipe: Recipe, plan: Plan) -> float:
    """Bytes a step reads and writes outside the matrix products.

    Per token and layer: two residual adds with norm, forward (x, residual in, y, residual out) and
    backward (dy, two of the residual in, two out), and GELU: 5 passes over 4C, or 2 in the triton
    op. Per token: 5 passes over the logits. Per parameter: 28 bytes for AdamW, 12 for the norm and
    the clip, and 12 for each micro-batch after the first.
    """
    config = recipe.model_config
    C, e = config.n_embd, 4 if plan.dtype == "fp32" else 2
    r = 4 if plan.residual == "fp32" else 2
    ops = plan.op_set
    gelu = 20 if ops.gelu_mlp is EAGER.gelu_mlp and not plan.compile else 8
    norms = 2 * (2 * e + 2 * r) + 2 * (2 * e + 3 * r)
    eager_loss = ops.linear_cross_entropy is EAGER.linear_cross_entropy and not plan.compile
    logits = 5 * e * config.padded_vocab_size
    casts = 6 if plan.dtype != "fp32" and not plan.working_copies else 0
    micro = plan.num_micro_batches
    per_parameter = 28 + 12 + 12 * (micro - 1) + casts * micro
    # Each chunk of tokens is added to the head's fp32 gradient: two reads and a write.
    chunks = -(-plan.micro_batch_size * recipe.block_size // CHUNK_TOKENS) if eager_loss else 1
    head = 12 * chunks * micro * config.padded_vocab_size * C
    return (
        recipe.tokens_per_step * (config.n_layer * C * (norms + gelu * e) + logits)
        + per_parameter * num_parameters(config)
        + head
    )


def roofline_s(recipe: Recipe, plan: Plan, matmul_gflops: float, copy_gbs: float) -> float:
    """Seconds of a step: flops (palm) at one rate plus `traffic_bytes` at the other."""
    flops = flops_per_token(recipe.model_config, recipe.block_size) * recipe.tokens_per_step
    return flops / (matmul_gflops * 1e9) + traffic_bytes(recipe, plan) / (copy_gbs * 1e9)


def elsewhere(recipe: Recipe, plan: Plan) -> list[str]:
    """A line for each known GPU, slowest first: the roofline at its datasheet's figures."""
    found: list[tuple[float, str]] = []
    for name, card in CARDS.items():
        there = replace(plan, dtype=card.dtype, compile=True, ops="eager")
        there = replace(there, working_copies=card.dtype == "bf16")
        speed = recipe.tokens_per_step / roofline_s(recipe, there, card.tflops * 1e3, card.gbs)
        rates = f"{card.dtype} {card.tflops:7.1f} TFLOP/s {card.gbs:7,.0f} GB/s"
        found.append((speed, f"{name:9} {rates} {speed:13,.0f} tok/s"))
    return [line for _, line in sorted(found)]


def findings(recipe: Recipe, machine: Machine, plan: Plan, rates: Rates, probe: Probe) -> list[str]:
    """What holds this run back beside the plan's notes, each with its number and a way out."""
    config, cuda, rate = recipe.model_config, machine.device == "cuda", rates.matmul(plan.dtype)
    tokens, D = plan.micro_batch_size * recipe.block_size, config.head_dim
    fp32, bf16 = rates.matmul("fp32"), rates.matmul_gflops.get("bf16", 0.0)
    device_s = sum(probe.phases.values())
    compute_s = probe.phases["forward"] + probe.phases["backward"]
    flops = flops_per_token(config, recipe.block_size) * recipe.tokens_per_step
    share, shaped = flops / compute_s / 1e9 / rate, rates.shape_gflops / rate
    data, update = (probe.phases[name] / device_s for name in ("data", "optimizer"))
    multiple = 64 if cuda else 16
    sizes = {"n_embd": config.n_embd, "tokens at once": tokens}
    odd = [f"{name} {size}" for name, size in sizes.items() if size % multiple]
    used, memory = max(probe.peak_bytes, plan.memory_bytes) / 1e9, machine.memory_bytes / 1e9
    spread = max(probe.seconds) / min(probe.seconds)
    table: list[tuple[bool, str]] = [
        (not machine.has_bf16 and plan.dtype == "bf16",
         f"bf16 is slow on {machine.name}, {bf16:,.0f} GFLOP/s against {fp32:,.0f} in fp32: "
         "--dtype fp32"),
        (machine.has_bf16 and plan.dtype == "fp32" and bf16 > 1.2 * fp32,
         f"fp32, but bf16 products are {bf16 / fp32:.1f} times as fast here: --dtype bf16"),
        (not cuda and machine.num_threads < rates.cores,
         f"threads: torch uses {machine.num_threads} of {rates.cores} cores: set "
         f"OMP_NUM_THREADS={rates.cores}"),
        (rates.power_limit_w < 0.9 * rates.power_max_w,
         f"power limit {rates.power_limit_w:.0f} W of {rates.power_max_w:.0f} W: as administrator, "
         f"nvidia-smi -pl {rates.power_max_w:.0f}"),
        (rates.sm_mhz < 0.7 * rates.sm_max_mhz,
         f"clock {rates.sm_mhz:.0f} of {rates.sm_max_mhz:.0f} MHz under load: nvidia-smi -q -d "
         "PERFORMANCE says whether heat, power or a lock limits it"),
        (cuda and not plan.cuda_graph and probe.host_s > 0.8 * device_s,
         f"batch too small: the host launches for {1e3 * probe.host_s:.1f} of {1e3 * device_s:.1f} "
         "ms: --cuda-graph, or a larger --batch-size"),
        (share < 0.7,
         f"forward+backward run at {100 * share:.0f}% of the matmul rate measured here"
         + ("; --compile fuses the ops between the products" if not plan.compile else
            "; uncompiled, unlike the run" if "not compiled" in probe.note else "")),
        (0 < shaped < 0.7,
         f"products of this model's shape ({tokens} x {config.n_embd} x {4 * config.n_embd}) reach "
         f"{100 * shaped:.0f}% of large ones: more rows at once, or a wider model"),
        (shaped > 1.3,
         f"products reached {shaped:.1f} times the large ones' rate: the machine was busy with "
         "something else; run this again"),
        (data > 0.05,
         f"data takes {100 * data:.0f}% of a step: put the token file on a faster disk"),
        (update > 0.2,
         f"optimizer takes {100 * update:.0f}% of a step, however few its tokens: a larger "
         "--batch-size or --grad-accum-steps"),
        (bool(odd),
         f"{', '.join(odd)}: not a multiple of {multiple}, so tiles of the products are partly "
         "empty"),
        (cuda and D not in (64, 128),
         f"head dim {D}: the attention kernels are tuned for 64 and 128"),
        (used > 0.9 * memory > 0,
         f"memory close to its limit: {used:.1f} of {memory:.1f} GB: a smaller --micro-batch-size"),
        (cuda and plan.num_micro_batches > 1 and 0 < used < 0.4 * memory,
         f"memory: {used:.1f} of {memory:.1f} GB used, in {plan.num_micro_batches} micro-batches: "
         "a larger --micro-batch-size"),
        (len(probe.seconds) >= 3 and spread > 1.5,
         f"steps differ by a factor of {spread:.1f}: something else uses this machine"),
    ]  # fmt: skip
    return [line for holds, line in table if holds]


def explain(recipe: Recipe, plan: Plan, machine: Machine, tokens: Tokens) -> None:
    """Print machine, rates, what to expect, what a few steps reached, and what would help."""
    versions = ", ".join(f"{k} {v}" for k, v in environment()["versions"].items() if v)
    rates = measure_rates(recipe, machine, plan)
    cores = f"{rates.cores} cores, torch threads: {machine.num_threads}"
    print(f"machine: {machine.name}, {cores}, {machine.memory_bytes / 1e9:.1f} GB of memory")
    cuda = f", CUDA {torch.version.cuda}, driver {rates.driver or 'unknown'}"
    print(f"  {platform.platform()}, {versions}{cuda if machine.device == 'cuda' else ''}")
    if rates.power_max_w:
        clock = f"clock under load {rates.sm_mhz:.0f} of {rates.sm_max_mhz:.0f} MHz"
        print(f"  power limit {rates.power_limit_w:.0f} of {rates.power_max_w:.0f} W, {clock}")
    print("\n  ".join([plan.describe(recipe.muon), *plan.notes]))

    matmul = ", ".join(f"{k} {v:,.0f}" for k, v in rates.matmul_gflops.items())
    shaped = f"{plan.dtype} in the model's shape {rates.shape_gflops:,.0f}"
    copies = f"copy {rates.copy_gbs:,.1f} GB/s (read + written)"
    print(f"measured here: {copies}; matmul GFLOP/s: {matmul}, {shaped}")
    bound_s = roofline_s(recipe, plan, rates.matmul(plan.dtype), rates.copy_gbs)
    per_step, traffic = recipe.tokens_per_step, f"{traffic_bytes(recipe, plan) / 1e9:.2f} GB"
    beside = f"{traffic} of traffic besides the products of {per_step:,} tokens"
    print(f"estimate from these rates: at most {per_step / bound_s:,.0f} tok/s ({beside})")
    alone_s = products_s(recipe, plan)
    print(
        f"matrix products alone, each timed at its own shape: {1e3 * alone_s:,.1f} ms, so at most "
        f"{per_step / alone_s:,.0f} tok/s"
    )
    print("this recipe elsewhere, computed from datasheets, not measured:")
    print("\n".join(f"  {line}" for line in elsewhere(recipe, plan)))

    got = probe_steps(recipe, plan, tokens)
    note = f" ({got.note})" if got.note else ""
    used = mfu(recipe.model_config, recipe.block_size, got.tokens_per_s, machine.name)
    flops = "" if used is None else f", MFU {100 * used:.1f}%"
    print(
        f"measured: {len(got.seconds)} steps{note}, {1e3 * got.step_s:,.1f} ms each, "
        f"{got.tokens_per_s:,.0f} tok/s, {100 * bound_s / got.step_s:.0f}% of the estimate, "
        f"{100 * alone_s / got.step_s:.0f}% of the products alone{flops}"
    )
    total = sum(got.phases.values())
    for name, s in got.phases.items():
        print(f"  {name:10}{1e3 * s:10,.1f} ms {100 * s / total:5.1f}%")
    print("  forward includes the gradients of the head, which the loss computes with the logits")
    print("what would help:")
    lines = findings(recipe, machine, plan, rates, got) or ["nothing stands out"]
    print("\n".join(f"  - {line}" for line in lines))
