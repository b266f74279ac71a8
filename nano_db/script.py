"""What every train_*.py does once it has said what its networks, its data and its evaluation are."""

from dataclasses import asdict
from pathlib import Path

from nano_db.errors import UsageError
from nano_db.report import benchmark, finish
from nano_db.run import Run, read_folder
from nano_db.settings import frozen_fields, parse
from nano_db.trainer import InTurn, Trainer
from nano_db.workers import join


def output_folder(script, settings):
    return Path(settings.out or f"out/{script}-{settings.method}")


def picture_path(script, settings):
    """Where the run's picture goes. With --eval-only it gets a name of its own: the one of the training stays."""
    path = output_folder(script, settings) / ("samples-again.png" if settings.eval_only else "samples.png")
    print(f"picture: {path}")
    return path


def read_settings(script, settings_class, presets, recipes, description):
    """The command line of `script` as checked settings; with --eval-only, completed from the run's config.json."""

    def stored(settings):
        folder = output_folder(script, settings)
        config, _ = read_folder(folder)
        if config["about"].get("script") != script:
            raise UsageError(f"{folder} holds no run of train_{script}.py: name the folder of one with --out")
        return config["settings"]

    return parse(settings_class, presets, recipes, description=description, stored=stored)


def run_script(
    script,
    settings,
    data_sha256,
    device,
    make,
    make_baseline,
    draw_batch,
    evaluate,
    metric,
    unit,
    use,
    in_turn=False,
):
    """Train what is not trained yet (under torchrun, this process's share), evaluate after each round, and report.

    make(b): builds the b-th network to train. make_baseline(): the end-to-end network to measure beside blocks.
    draw_batch(): a training batch on `device`, from torch's global generator. evaluate(networks, folder): prints what
    it finds of the trained networks, writes its samples into `folder` (None with --eval-only) and returns a
    dictionary of metrics; of these, `metric` (in `unit`) is drawn in curves.png.

    use(networks, n): classifies, paints or writes n samples, to report what one costs (inference.py). in_turn: evaluate
    goes through the networks one after the other, so that one at a time is enough in memory.
    """
    worker = join()
    trainer = Trainer(None, make, draw_batch, settings, device, worker)
    if settings.benchmark:
        if worker.ranks > 1:
            raise UsageError("--benchmark times a single process: start it without torchrun")
        benchmark(trainer, make_baseline, settings.benchmark, use)
        return
    about = {"script": script, "data_sha256": data_sha256}
    run = Run(output_folder(script, settings), asdict(settings), frozen_fields(type(settings)), about)
    trainer.run, metrics = run, {}

    def after_round(step):
        networks = InTurn(trainer)
        if not in_turn:
            networks = list(networks)
        print(f"after {step} steps" + (" of each network:" if trainer.networks > 1 else ":"))
        metrics.update(evaluate(networks, None if settings.eval_only else run.folder))
        if not settings.eval_only:
            run.log(kind="evaluation", step=step, **metrics)

    complete = trainer.train_all(after_round)
    if worker.rank:
        return  # process 0 reports for all
    if not complete:
        print(f"still to train: blocks {', '.join(map(str, trainer.unfinished()))} of {run.folder}")
    elif not settings.eval_only:
        finish(script, trainer, metrics, make_baseline, use)
        from nano_db.plots import draw_curves  # not at the top: importing matplotlib takes a second

        draw_curves(run.folder, metric, unit, metrics.get("nats_per_block", ()))
        files = sorted(path.name for path in run.folder.iterdir() if not path.name.startswith("."))
        print(f"\n{run.folder}: {', '.join(files)}")
