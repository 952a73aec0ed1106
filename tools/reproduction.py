"""What makes every record that is committed or still wanted: data alone, read by `tools/reproduce.py`.

In a command {seed} is the seed, {out} a folder of the job's own, {leaf} the record's own name, {record} where the
record is to be written and {parent} the folder above; "> FILE" keeps what a command prints. There is no shell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

SEEDS = (7, 42, 1337)
MIRROR, DROPOUT, BLOCKS = " --data.mirror", " --model.dropout 0.1", " --data.split interleaved"
PLAIN = " --model.values plain"
DENSITY, ORACLE_STEPS = "rh_memory.density", "iceaggr/oracle-steps"
FEW_ZEROS = (
    (40_000, "", ""), (40_000, "-mirror", MIRROR), (40_000, "-dropout", DROPOUT), (40_000, "-interleaved", BLOCKS),
    (40_000, "-interleaved-mirror", BLOCKS + MIRROR), (40_000, "-plain", PLAIN),
    (40_000, "-plain-mirror", PLAIN + MIRROR), (200_000, "", ""), (200_000, "-mirror", MIRROR),
)  # fmt: skip
MUON_EMA = "--optim.optimizer muon --optim.ema 0.999"
RUN_FILES = ("config.json", "manifest.json", "metrics.jsonl", "evaluation.json")


@dataclass(frozen=True)
class Entry:
    """One experiment or bench. Seconds are of one run: on one H200 (of each GPU it needs), or on 2 cores if gpus is 0.

    name: also its job's. feeds: the table, figure or claim that shows it. record: path from the root; with {seed}, one
    for each of `seeds`. steps: commands, in order; none where today's code cannot make it again. seconds: None where
    not measured. source: what `seconds` rests on. gpus: 0.5 lets two share one. keep: files and folders of
    {out}/{leaf} that the record consists of, where no command collects them.
    """

    name: str
    feeds: str
    record: str
    steps: tuple[str, ...]
    seconds: float | None = None
    source: str = "not measured"
    gpus: float = 0.0
    seeds: tuple[int, ...] = ()
    keep: tuple[str, ...] = ()

    def runs(self) -> Iterator[Entry]:
        """Itself, or one for each seed with the seed put in."""
        for seed in self.seeds:
            steps = tuple(step.replace("{seed}", str(seed)) for step in self.steps)
            record = self.record.format(seed=seed)
            yield replace(self, name=f"{self.name}-seed{seed}", record=record, steps=steps, seeds=())
        if not self.seeds:
            yield self


RH, AC, GA, ICE = (f"packages/{name}/results" for name in ("rh_memory", "attn_clustering", "gauge_attn", "iceaggr"))

EIGHT = "the jobs' own seconds, eight at a time, on GPUs with other work"

TEXTS = "data/text/openstax_ccby.jsonl.gz data/text/standardebooks_cc0.jsonl.gz"
"""Documents with a topic each, one JSON object a line; not part of the repository."""


def sweep(
    preset: str,
    seconds: float | None,
    source: str = "the record",
    *,
    steps: int | None = None,
    diagnose: bool = False,
    data: str = "zeta",
    feeds: str = "rh_memory.scores",
) -> Entry:
    """Seeds of an rh_memory preset, collected as `rh-memory sweep` names them."""
    run = preset + ("" if data == "zeta" else f"-{data}") + ("" if steps is None else f"-{steps}steps")
    options = (f" --source {data}" if data != "zeta" else "") + (f" --steps {steps}" if steps else "")
    command = f"rh-memory sweep {preset} --seeds {{seed}}{options} --out {{out}} --collect {{parent}}"
    command += " --diagnose" if diagnose else ""
    return Entry(f"rh-{run}", feeds, f"{RH}/runs/{run}-seed{{seed}}", (command,), seconds, source, 1.0, SEEDS)


def trained(
    name: str, what: str, seconds: float, source: str = "runs that shared an H200", *,
    feeds: str = "rh_memory.scores", gpus: float = 1.0, seeds: tuple[int, ...] = SEEDS, folder: str = "runs",
) -> Entry:  # fmt: skip
    """Seeds of an rh_memory preset with other fields."""
    train = f"rh-memory train {what} --seed {{seed}} --wandb disabled --out {{out}}/{{leaf}}"
    steps = (train, "rh-memory collect {out}/{leaf} --out {parent}")
    return Entry(f"rh-{name}", feeds, f"{RH}/{folder}/{name}-seed{{seed}}", steps, seconds, source, gpus, seeds)


def control(suffix: str, flags: str, seconds: float, feeds: str = "rh_memory.controls") -> Entry:
    """Seeds of rh_memory's small model with something else in it, on CPU cores."""
    name = f"explicit-small-{suffix}"
    return trained(name, f"explicit-small {flags}", seconds, "the record", feeds=feeds, gpus=0.0)


def matrix(experiment: str, seconds: float | None, source: str, options: str = "", gpus: float = 1.0) -> Entry:
    """An attn_clustering experiment."""
    run = f"attn-clustering matrix {experiment} {options} --out {{out}}/matrix"
    steps = (run, "attn-clustering collect {out}/matrix --out {record}")
    return Entry(
        f"attn-{experiment}", f"attn_clustering.{experiment}", f"{AC}/{experiment}", steps, seconds, source, gpus
    )


def study(name: str, options: str, seconds: float | None = None, source: str = "not measured", gpus: int = 1) -> Entry:
    """An ablation study of iceaggr on simulated events, four trainings on each GPU at a time."""
    step = f"iceaggr ablate {name} --stream --epochs 1 --workers {4 * gpus} --gpus-per-job 0.25 {options}"
    return Entry(
        f"ice-{name}", f"iceaggr.ablate-{name}", f"{ICE}/ablate-{name}", (f"{step} --out {{out}}/{{leaf}}",),
        seconds, source, gpus, keep=("results.json", "curves.json", "errors"),
    )  # fmt: skip


def analysed(name: str, options: str, events: int) -> Entry:
    """One model of iceaggr trained on a GPU, then scored, calibrated and analysed on CPU cores."""
    train = "iceaggr train small --data stream --data.train-events 2000000 --epochs 1 --tokens-per-batch 65536"
    after = (
        f"evaluate {{out}}/{{leaf}} --device cpu --events {events}", "calibrate {out}/{leaf}",
        "analyze {out}/{leaf} --device cpu --inside 5000 --permuted 2000", "report {out}/{leaf}",
    )  # fmt: skip
    return Entry(
        f"ice-analysis-{name}", "iceaggr.analysis-notes", f"{ICE}/analysis-{name}-2M-h200-seed0",
        (f"{train} --data.val-events {events} {options} --wandb disabled --out {{out}}/{{leaf}}",
         *(f"iceaggr {step}" for step in after)),
        gpus=1, keep=("evaluation.json", "calibration.json", "analysis.json", "resolution.csv"),
    )  # fmt: skip


def bench(name: str, feeds: str, record: str, command: str, seconds: float | None = None, gpus: float = 1.0) -> Entry:
    """A speed suite, which writes its own record."""
    source = "not measured" if seconds is None else "wall time of the call"
    return Entry(name, feeds, record, (f"{command} --out {{record}}",), seconds, source, gpus)


ENTRIES = (
    # iceaggr
    bench("ice-bench", "iceaggr.gpu-speed", f"{ICE}/bench/iceaggr-cuda.json", "iceaggr bench --device cuda"),
    bench("ice-bench-cpu", "iceaggr.cpu-speed", f"{ICE}/bench/iceaggr-cpu.json", "iceaggr bench --device cpu", gpus=0),
    bench("ice-bench-vm", "iceaggr.cpu-speed", f"{ICE}/bench/iceaggr-cpu-vm.json", "iceaggr bench --device cpu",
          gpus=0),
    Entry(
        "ice-quick", "iceaggr.reconstruction", f"{ICE}/quick-cpu-seed0",
        ("iceaggr train quick --seed 0 --wandb disabled --out {out}/{leaf}",),
        278, f"{ICE}/observed.json", keep=RUN_FILES,
    ),
    Entry(
        "ice-small", "iceaggr.reconstruction", f"{ICE}/small-h200-seed0",
        ("iceaggr train small --wandb disabled --epochs 10 --data.train-events 2000000 --data.val-events 50000"
         " --log-every 200 --eval-every 1000 --checkpoint-every 2000 --out {out}/{leaf}",),
        158, f"{ICE}/observed.json", 1, keep=RUN_FILES,
    ),
    Entry(
        "ice-times", "wall times of ice-quick and ice-small", f"{ICE}/observed.json", (),
        source="read off a console by hand",
    ),
    *(Entry(f"ice-{x}", feeds, f"{ICE}/oracle/{x}-cpu-seed7.json",
            (f"iceaggr oracle --events {n} --seed 7 --device cpu{more} --out {{record}}",))
      for x, feeds, n, more in (("oracle", "iceaggr.oracle", 5000, ""), ("oracle-300", ORACLE_STEPS, 300, ""),
                                ("oracle-300-thorough", ORACLE_STEPS, 300, " --scan 32 --steps 60"))),
    Entry(
        "ice-oracle-first", "iceaggr.oracle-first", f"{ICE}/oracle/first-likelihood-h200-seed7.json", (),
        source="made with a likelihood that the code no longer has",
    ),
    Entry(
        "ice-realism", "iceaggr.realism", f"{ICE}/realism",
        ("iceaggr simulate --out {out}/events --events 120000 --seed 1 --device cpu",
         "iceaggr inspect {out}/events --json --plot {out}/{leaf}/qq.png > {out}/{leaf}/inspect.json"),
        keep=("qq.png", "inspect.json"),
    ),
    study("seed-table", "--events 2000000", 300, EIGHT, gpus=2),
    study("choices", "--events 2000000", 515, "wall time of the call, three at a time, on a GPU with other trainings"),
    study("v3", "--events 1000000", 250, EIGHT, gpus=2),
    study("scale", "--events 1000000"),
    Entry(
        "ice-small-batches", "iceaggr.small-batches", f"{ICE}/ablate-v3-small-batches",
        ("iceaggr ablate v3 --stream --epochs 1 --events 2000000 --tokens-per-batch 65536 --workers 4"
         " --gpus-per-job 0.25 --only base fourier aggregates ice interval mixture --out {out}/study",
         "iceaggr ablate v3 --so-far --out {out}/study --json > {out}/{leaf}/runs.json"),
        gpus=1, keep=("runs.json",),
    ),
    analysed("v2", "", 100_000),
    analysed("aggregates", "--model.aggregates", 30_000),
    # rh_memory
    bench("rh-bench", "rh_memory.speed", f"{RH}/bench/rh-memory-cuda.json", "rh-memory bench --device cuda"),
    bench("rh-bench-cpu", "rh_memory.speed", f"{RH}/bench/rh-memory-cpu.json", "rh-memory bench --device cpu", gpus=0),
    bench(
        "rh-zeros", "rh_memory.zeros", f"{RH}/bench/zeros-cuda.json",
        "rh-memory bench --device cuda --zeros 100000 2001052 20000000 100000000", 60,
    ),
    bench(
        "rh-zeros-cpu", "rh_memory.zeros", f"{RH}/bench/zeros-cpu.json",
        "rh-memory bench --device cpu --zeros 100000 2001052", 60, gpus=0,
    ),
    Entry(
        "rh-quick", "rh_memory.primes", f"{RH}/runs/explicit-small-cpu-seed0",
        ("rh-memory train explicit-small --seed 0 --wandb disabled --out {out}/{leaf}",
         "rh-memory physics {out}/{leaf}", "rh-memory collect {out}/{leaf} --out {parent}"),
        249, f"{RH}/observed.json",
    ),
    Entry("rh-times", "wall times of rh-quick and baselines", f"{RH}/observed.json", (), source="read off a console"),
    sweep("explicit", 145),
    sweep("explicit", 420, steps=16_000),
    sweep("explicit-random", 145, "runs of explicit", feeds="rh_memory.controls"),
    *(sweep(f"explicit-{x}", 145, "runs of explicit", feeds="rh_memory.controls")
      for x in ("even", "composite", "shuffled", "frozen")),
    sweep("explicit-small", 33, data="shuffled"),
    sweep("e0-rope", 111),
    *(sweep(preset, 320, "runs that shared an H200, and a diagnosis", diagnose=True)
      for preset in ("e1-rope", "e2-rope")),
    sweep("e0", 790, "runs that shared an H200"),
    sweep("e1", None, "not measured", diagnose=True),
    sweep("e2", None, "not measured", diagnose=True),
    *(sweep(preset, 130, steps=3000, diagnose=True, feeds="rh_memory.memory") for preset in ("e3", "e4", "e5")),
    *(sweep(preset, 370, "runs of 3,000 steps", diagnose=True, feeds="rh_memory.memory")
      for preset in ("e3", "e4", "e5")),
    sweep("e3-explicit", 215, "runs that shared an H200"),
    trained("e0-rope-muon", "e0-rope --optim.optimizer muon", 220),
    trained("explicit-muon-ema", f"explicit {MUON_EMA}", 175, seeds=(7, 42)),
    trained("explicit-muon-ema-10000steps", f"explicit {MUON_EMA} --steps 10000", 560, seeds=(7,)),
    Entry(
        "rh-e0-stopped", "rh_memory.stopped", f"{RH}/runs/e0-18974of20000steps-seed7", (),
        source="a run of rh-e0 that was stopped by its time limit",
    ),
    *(control(x, flags, 161) for x, flags in (("primes", ""), ("mirror", "--data.mirror"))),
    *(control(f"{n}zeros{x}", f"--data.zeros {n}{flags}", 270, feeds="rh_memory.few") for n, x, flags in FEW_ZEROS),
    *(control(f"frequencies-{x}", f"--model.frequencies {x}", 160) for x in ("composite", "random", "shuffled")),
    control("frequencies-even", "--model.frequencies even", 132),
    *(control(f"frequencies-even-to-{x}", f"--model.frequencies even --model.frequency-top {x}", 139) for x in (8, 12)),
    *(control(f"frequencies-even-of-{n}", f"--model.frequencies even --model.frequency-count {n}", 800, DENSITY)
      for n in (1, 2, 8, 16)),
    control("frequencies-even-to-2.57-of-16", "--model.frequencies even --model.frequency-top 2.57 "
            "--model.frequency-count 16", 840, DENSITY),
    *(control(f"frequencies-random{x}", f"--model.frequencies random --model.frequency-seed {x}", 140) for x in (1, 2)),
    control("height-frozen", "--model.height frozen", 168),
    control("plain-values", "--model.values plain", 153),
    control("interleaved", "--data.split interleaved", 160),
    control("gue", "--data.source gue", 136),
    trained("explicit-small", "explicit-small --use-amp True", 300, "runs on busy cores", gpus=0.0,
            feeds="rh_memory/bfloat16-cpu", folder="bfloat16-cpu"),
    # attn_clustering
    bench("attn-bench", "attn_clustering.speed", f"{AC}/bench/attn-clustering-cuda.json",
          "attn-clustering bench --device cuda"),
    bench("attn-bench-cpu", "attn_clustering.speed", f"{AC}/bench/attn-clustering-cpu.json",
          "attn-clustering bench --device cpu", gpus=0),
    *(Entry(f"attn-levels-{x}", "attn_clustering.levels", f"{AC}/levels/{x}.json",
            (f"attn-clustering levels {x} --json > {{record}}",)) for x in ("faithful-v1", "sanity")),
    Entry("attn-times", "wall times of `matrix` smoke, sanity, faithful-v1 and text", f"{AC}/observed.json", (),
          source="read off a console by hand"),
    matrix("sanity", 65, f"{AC}/observed.json"),
    matrix("faithful-v1", 1026, f"{AC}/observed.json", "--workers 4 --gpus-per-job 0.25"),
    Entry(
        "attn-text", "attn_clustering.text-contrasts", f"{AC}/text",
        (f"attn-clustering prepare {TEXTS} --topic-field topic --embedder given --out {{out}}/corpus",
         "attn-clustering matrix text --data {out}/corpus --workers 4 --gpus-per-job 0.25 --out {out}/matrix",
         "attn-clustering collect {out}/matrix --out {record}"),
        350, f"{AC}/observed.json, of the matrix alone; corpus.json there is from the corpus's manifests", 1,
    ),
    matrix("controlled-small", None, "not measured", "--parts all --seeds 8", gpus=0),
    matrix("controlled-v1", 940, "its 72 jobs, four at a time on GPUs that others shared",
           "--parts endpoint --seeds 8 --gpus-per-job 0.25"),
    # gauge_attn
    bench("gauge-bench", "gauge_attn.gpu-requirements", f"{GA}/bench/gauge-attn-cuda.json",
          "gauge-attn bench --device cuda"),
    bench("gauge-bench-cpu", "gauge_attn.speed", f"{GA}/bench/gauge-attn-cpu.json", "gauge-attn bench --device cpu",
          gpus=0),
    bench("gauge-bench-lengths", "gauge_attn.gpu-speed", f"{GA}/bench/gauge-attn-lengths-cuda.json",
          "gauge-attn bench --device cuda --only precision speed"),
    bench("gauge-bench-models", "gauge_attn.gpu-models", f"{GA}/bench/gauge-attn-models-cuda.json",
          "gauge-attn bench --models --device cuda"),
    *(Entry(f"gauge-own-kernel-{of}", feeds, f"{GA}/bench/own-kernel-{of}.json", (),
            source="gauge-attn bench of commit ecf69c5, GAUGE_ATTN_KERNEL=triton; that kernel is removed")
      for of, feeds in (("cuda", "gauge_attn.own-kernel"), ("models-cuda", "gauge_attn/speed-models-bf16x3"))),
    Entry(
        "gauge-quick", "gauge_attn.main-job", f"{GA}/quick-cpu-seed0",
        ("gauge-attn train quick --wandb disabled --out {out}/{leaf}",),
        60, f"{GA}/observed.json", keep=RUN_FILES,
    ),
    Entry("gauge-times", "wall time of gauge-quick", f"{GA}/observed.json", (), source="read off a console by hand"),
    Entry("gauge-theory", "gauge_attn.theory", f"{GA}/theory.json", ("gauge-attn theory --json > {record}",)),
    *(Entry(f"gauge-grid-{name}", f"gauge_attn.grid-{name}-verdicts", f"{GA}/grid-{name}",
            (f"gauge-attn grid {grid} --data tinyshakespeare --out {{out}}/{{leaf}}",), keep=("results.json",))
      for name, grid in (("tinyshakespeare", "all"), ("matrix", "matrix --steps 100 --seeds 1"))),
    # the lab
    bench("lab-attention", "shared.speed", "shared/results/bench/attention-cuda.json",
          "python tools/bench_attention.py --device cuda"),
    Entry("lab-attention-128", "shared.speed", "shared/results/bench/attention-cuda-blocks-of-128.json", (),
          source="made with blocks of 128, which the code no longer has"),
    bench("lab-optim", "shared.speed", "shared/results/bench/optim-cuda.json",
          "python tools/bench_optim.py --device cuda"),
    bench("lab-scaling", "lab.scaling", "shared/results/bench/scaling-cuda.json",
          "python tools/bench_scaling.py --processes 1 2 --repeats 3", gpus=2),
    Entry("lab-faults", "lab.faults", "tools/results/faults.json", ("python tools/faults.py --record",)),
    Entry("lab-fuzz", "lab.fuzz", "tools/results/fuzz.json", ("python tools/fuzz.py --record",)),
    Entry("lab-walk", "the walk of the documents", "tools/results/walk.json",
          ("python tools/walk.py --run --record",)),
    *(Entry(f"claims-{part.split('/')[-2]}", "every claim", f"{part}/claims", ("python tools/report.py",))
      for part in (ICE, RH, AC, GA, "shared/results")),
)  # fmt: skip
