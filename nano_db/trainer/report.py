"""What a run leaves: result.json, curves.png and the cost of training and of inference, at its end; and a language
model's texts.
"""

import json
import os
import statistics
import time
from dataclasses import asdict, replace

import torch

from nano_db.errors import UsageError, is_out_of_memory
from nano_db.language import EVALUATION_BATCH
from nano_db.layers import Layer
from nano_db.trainer.checkpoints import write_json, write_text
from nano_db.trainer.memory import allocator_peak, training_bytes
from nano_db.trainer.run import VERSIONS, autocast, first_weights, make_optimizer, networks

LARGE_VOCABULARY = 2000  # tokens: above this, their memory may surprise a beginner


def report(run, metrics, metric, build, batch, sample, *shared):
    """Write result.json and curves.png, print what training and a sample cost, and list the run's files.

    metrics: the script's own; `metric` is drawn over the rounds. build, batch, sample and shared: the script's, too.
    memory_bytes and seconds_per_step are the maximum over networks; seconds_per_step_all_blocks is the sum.
    """
    settings, local = run.settings, replace(run.settings, batch_size=run.batch_size)  # with this process's batch
    costs = {settings.method: costs_of(local, build, batch, sample, *shared)}
    seconds = [(state := run.load_block(b))["seconds"] / state["step"] for b in range(run.count)]
    result = {"script": run.script, "method": settings.method, "blocks": run.count, "steps": settings.steps}
    result |= {"seed": settings.seed, "device": settings.device, "versions": VERSIONS, "metrics": metrics}
    result["settings"] = asdict(settings)  # those of this evaluation; config.json has those of the first command
    result |= {"seconds_per_step": max(seconds), "seconds_per_step_all_blocks": sum(seconds), **costs[settings.method]}
    write_json(run.folder / "result.json", result)
    if not settings.baseline:  # the network that blocks help to avoid: it may be too large for this machine
        try:
            costs["end to end"] = costs_of(end_to_end(local), build, batch, sample, *shared)
            result["baseline_memory_bytes"] = costs["end to end"]["memory_bytes"]
            write_json(run.folder / "result.json", result)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            print("end to end: a training step does not fit into this machine's memory")
    print_costs(costs)

    from nano_db.trainer.plots import draw_curves  # not at the top: importing matplotlib takes a second

    draw_curves(run.folder, metric, metrics.get("nats_per_block", ()))
    files = sorted(path.name for path in run.folder.iterdir() if not path.name.startswith("."))
    print(f"\n{run.folder}: {', '.join(files)}")


def end_to_end(settings):
    """The settings for one end-to-end network instead of blocks."""
    return replace(settings, **settings.of_baseline())


def costs_of(settings, build, batch, sample, *shared):
    """memory_bytes: a training step's, by part, for the largest network. parameters: those of all networks.
    one_sample: see cost_of_use.
    """
    counts, context = [], autocast(settings)
    for b in range(networks(settings)):  # one at a time: all of them may be more than the machine can train
        network = first_weights(build, b, settings, *shared)
        samples = batch(settings.batch_size, settings, *shared)
        optimizer = make_optimizer(network, settings)
        counts.append(training_bytes(network, samples, optimizer, context))
        if settings.device == "cuda":
            counts[-1]["allocator_peak"] = allocator_peak(network, samples, optimizer, context)
        del network, optimizer
    built = [first_weights(build, b, settings, *shared).eval() for b in range(networks(settings))]
    return {
        "parameters": sum(p.numel() for network in built for p in network.parameters()),
        "memory_bytes": max(counts, key=lambda count: count["total"]),
        "one_sample": cost_of_use(settings, built, sample, *shared),
    }


def cost_of_use(settings, built, sample, *shared, count=16):
    """Cost of one sample, as a dictionary; it does not depend on the weights. built: networks, in evaluation mode.

    seconds: the median of three timings of a batch of `count`, divided by `count`. weights: bytes of the largest
    network. A walk of a DiT or of masked diffusion needs only one at a time, averaged predictions need all.
    """
    evaluations = []
    layers = [m for network in built for m in network.modules() if isinstance(m, Layer)]
    handles = [layer.register_forward_pre_hook(lambda _, args: evaluations.append(len(args[0]))) for layer in layers]
    with autocast(settings):
        sample(built, 1, settings, *shared)
        for handle in handles:
            handle.remove()
        times = [seconds_of(settings, sample, built, count, settings, *shared) for _ in range(4)][1:]  # after a warm-up
    weights = max(sum(t.nbytes for t in (*network.parameters(), *network.buffers())) for network in built)
    return {"layer_evaluations": sum(evaluations), "seconds": statistics.median(times) / count, "weights": weights}


def seconds_of(settings, work, *args):
    """Seconds that work(*args) takes, the device's work included."""
    clock = time.perf_counter()
    work(*args)
    if settings.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - clock


def print_costs(costs):
    """Two tables of text, with ratios to the last column in brackets. costs: {column: what costs_of returns}."""
    units = {"layer_evaluations": ("", 1), "seconds": ("ms", 1000)}
    for part, title in (("memory_bytes", "training memory"), ("one_sample", "inference, one sample")):
        print(f"\n{title:32}" + "".join(f"{column:>22}" for column in costs))
        *_, last = (cost[part] for cost in costs.values())
        for figure in last:
            unit, factor = units.get(figure, ("MiB", 2**-20))
            numbers = [cost[part][figure] for cost in costs.values()]
            cells = [f"{number * factor:.2f} {unit} ({number / (last[figure] or 1):.3f})" for number in numbers]
            label = "weights of one network" if figure == "weights" else figure.replace("_", " ")
            print(f"  {label:30}" + "".join(f"{cell:>22}" for cell in cells))


# --- texts and pictures ---


def note_vocabulary(classes, settings):
    """Before training, say how much memory a large vocabulary takes, which may surprise a beginner."""
    if classes >= LARGE_VOCABULARY and not settings.eval_only:
        weights = 16 * 2 * classes * settings.width  # with gradients and AdamW's averages, in float32
        logits = 4 * settings.batch_size * settings.seq_len * classes
        about = f"embedding and output projection of each network take {weights / 2**20:,.0f} MiB in training"
        print(f"{classes:,} different tokens: {about}, the logits of a batch {logits / 2**20:,.0f} MiB")


def can_score(data):
    """Whether held-out data is available. If not, prints why: --eval-only may still sample without it."""
    if data.missing:
        print(f"not scored, only sampled: {data.missing}. If it has moved, give its path with --data")
    return not data.missing


def keep_samples(run, texts):
    """Save texts in samples.txt (not with --eval-only), and print them."""
    if texts:
        if not run.settings.eval_only:
            write_text(run.folder / "samples.txt", "\n---\n".join(texts))
        print("", *texts, sep="\n---\n")


def continue_prompt(text, complete, settings, *model):
    """settings.samples texts that continue settings.prompt, or else the first held-out tokens; a bar divides the prompt
    from what was sampled. complete: see export_texts.
    """
    prompt = list(text.tokenizer.encode(settings.prompt)) or text.opening
    tokens = torch.tensor([prompt] * settings.samples, dtype=torch.long, device=settings.device)
    if settings.samples:
        generator = torch.Generator().manual_seed(settings.seed)
        tokens = complete(tokens, settings.sample_length, generator, settings, *model)
    decode = text.tokenizer.decode
    return [decode(row[: len(prompt)]) + "|" + decode(row[len(prompt) :]) for row in tokens.tolist()]


def export_texts(run, text, complete, *model):
    """After the last round take --export held-out windows, keep the first quarter of each, and sample the rest anew.
    texts.jsonl of the run gets a line per window: its "prompt", what was "generated", and the "original" text.

    complete(tokens (n, m), length, generator, settings, *model): returns (n, m + length) tokens.
    """
    settings, path, lines = run.settings, run.folder / "texts.jsonl", []
    generator, shown = torch.Generator().manual_seed(settings.seed), max(1, round(settings.seq_len / 4))
    windows = text.heldout_batches(EVALUATION_BATCH, settings.seq_len, settings.device, settings.export)
    for x, _ in windows if settings.export and run.last_round else ():
        generated = complete(x[:, :shown], settings.seq_len - shown, generator, settings, *model)
        for old, new in zip(x.tolist(), generated.tolist(), strict=True):
            parts = {"prompt": old[:shown], "generated": new[shown:], "original": old[shown:]}
            lines.append(json.dumps({name: text.tokenizer.decode(tokens) for name, tokens in parts.items()}))
    if lines:
        write_text(path, "\n".join(lines) + "\n")
        print(f"exported: {path}")


def picture(run):
    """Where the run's picture goes. With --eval-only it has another name, to keep the one from training."""
    path = run.folder / ("samples-again.png" if run.settings.eval_only else "samples.png")
    print(f"picture: {path}")
    return path


def is_taken(path):
    """Whether there is a file, or a folder that holds anything."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def refuse_inside(settings):
    """Raise UsageError if the run's folder would lie inside its data, a folder of pictures."""
    if os.path.realpath(settings.out).startswith(os.path.join(os.path.realpath(settings.data), "")):
        raise UsageError(f"--out {settings.out} lies inside --data {settings.data}: its pictures would become data")


def refuse_old_images(folder):
    """Raise UsageError where the folder holds anything: images of two runs must not be mixed."""
    if is_taken(folder):
        raise UsageError(f"{folder} holds images already: move it away, or they would be mixed with the new ones")
