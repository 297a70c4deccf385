"""`d2o pairs`."""

from __future__ import annotations

import typer

from d2o.cli import complete, console
from d2o.cli.opening import GUIDE, check_guide, open_teacher
from d2o.errors import UserError

CHURN = "Stochastic Heun (--solver sde), Karras et al. 2022, Algorithm 2"
RUNNING, STORE, WORKERS, TOOLS = "How the network is run", "What is stored", "Several workers", "Stores that exist"


def pairs(
    teacher: str = typer.Option(
        None,
        "--teacher",
        help=(
            "Teacher: a name (digits, cifar16, tiny-sd, sd15, sdxl, edm-cifar10-cond-vp, ...), a diffusers "
            "folder or repository, an NVIDIA .pkl, a .safetensors checkpoint or run folder."
        ),
        show_default=False,
        autocompletion=complete.teachers,
    ),
    n: int = typer.Option(
        None,
        "--n",
        "-n",
        help="Number of pairs. Default with --prompts: one for every prompt, times --per-prompt.",
        show_default=False,
    ),
    out: str = typer.Option(
        None,
        "--out",
        help=(
            "Folder of the store, or any fsspec URL (s3://bucket/pairs); a store that was begun there is "
            "continued. Default: a name made of the settings, under runs/pairs."
        ),
        show_default=False,
    ),
    solver: str = typer.Option(
        None,
        "--solver",
        help="heun, euler, ddim, dpmpp (DPM-Solver++ 2M) or sde (stochastic Heun). Default: the teacher's usual one.",
        show_default=False,
    ),
    steps: int = typer.Option(
        None,
        "--steps",
        help=(
            "Solver steps (heun and sde evaluate the network 2 x steps - 1 times, the others steps "
            "times). Default: the teacher's usual number."
        ),
        show_default=False,
    ),
    seed: int = typer.Option(0, "--seed", help="Seed of the first pair; pair i has seed + i."),
    cfg: str = typer.Option(
        "1",
        "--cfg",
        help=(
            "Guidance weight w of D_u + w (D_c - D_u); 1 is none, others run the network twice. 1:8: each pair has a"
            " weight of its own, uniform from 1 to 8, for students that are told it."
        ),
    ),
    guide: str = GUIDE,
    sdxl_uncond: str = typer.Option(
        None,
        "--sdxl-uncond",
        help=(
            "What guidance of Stable Diffusion XL takes for no prompt: zeros (all-zero text), or encode_empty (the"
            " empty prompt, encoded). Default: as the teacher's model_index.json says; the published XL: zeros."
        ),
        show_default=False,
    ),
    labels: str = typer.Option(
        "random",
        "--labels",
        help="Classes: random or uniform (from the pair's seed), balanced, or indices in turn: 0,1,2.",
    ),
    prompts: str = typer.Option(
        None,
        "--prompts",
        help=(
            "Prompts for teachers that take text: .txt (one a line), .jsonl or .parquet (column "
            "prompt, text or caption)."
        ),
        show_default=False,
    ),
    per_prompt: int = typer.Option(
        1, "--per-prompt", help="Pairs in a row that share a prompt; after the last prompt the first follows."
    ),
    rewire: str = typer.Option(
        "none", "--rewire", help="permute: give every noise the output of another one (an experiment that must fail)."
    ),
    spacing: str = typer.Option(
        None,
        "--spacing",
        help="Time steps of SD-like teachers: leading, trailing or linspace. Default: the teacher's own.",
        show_default=False,
    ),
    final: str = typer.Option(
        "scheduler",
        "--final",
        help=(
            "Last step of SD-like teachers: as its scheduler says (SD: a little noise stays), "
            "or x0 (to the predicted image itself)."
        ),
    ),
    eta: float = typer.Option(0.0, "--eta", help="Fresh noise in ddim, 0 (none) to 1 (DDPM's ancestral sampler)."),
    s_churn: float = typer.Option(40.0, "--s-churn", help="Fresh noise of all steps together.", rich_help_panel=CHURN),
    s_min: float = typer.Option(0.05, "--s-min", help="Lowest sigma at which noise is added.", rich_help_panel=CHURN),
    s_max: float = typer.Option(50.0, "--s-max", help="Highest sigma at which noise is added.", rich_help_panel=CHURN),
    s_noise: float = typer.Option(
        1.003, "--s-noise", help="Standard deviation of the added noise.", rich_help_panel=CHURN
    ),
    shard_size: int = typer.Option(1024, "--shard-size", help="Pairs per file.", rich_help_panel=STORE),
    dtype: str = typer.Option(
        "fp32", "--dtype", help="Number format of the targets on disk: fp32, fp16 or bf16.", rich_help_panel=STORE
    ),
    store_noise: bool = typer.Option(
        False,
        "--store-noise",
        help="Keep the noise in the store instead of deriving it from the seeds.",
        rich_help_panel=STORE,
    ),
    decode: bool = typer.Option(
        False,
        "--decode",
        help="Also decode the latents and keep the images (uint8). Without it the VAE never runs.",
        rich_help_panel=STORE,
    ),
    batch: int = typer.Option(
        None,
        "--batch",
        help="Pairs per teacher call (256); a begun store keeps its own.",
        show_default=False,
        rich_help_panel=RUNNING,
    ),
    precision: str = typer.Option(
        "fp32",
        "--precision",
        help="fp32; bf16 or fp16 inside the network; or auto: bf16 where the processor computes in it.",
        rich_help_panel=RUNNING,
    ),
    channels_last: bool = typer.Option(
        None,
        "--channels-last/--no-channels-last",
        help="Channels-last memory order of the network. Default: where that is faster.",
        show_default=False,
        rich_help_panel=RUNNING,
    ),
    compile: str = typer.Option(
        "none", "--compile", help="torch.compile: none, default, or graphs (CUDA graphs).", rich_help_panel=RUNNING
    ),
    device: str = typer.Option(
        None,
        "--device",
        help="cpu, cuda or cuda:N. Default: CUDA if there is one.",
        show_default=False,
        rich_help_panel=RUNNING,
    ),
    threads: int = typer.Option(
        None,
        "--threads",
        help="CPU threads of torch. Default: torch's own; a begun store keeps its own.",
        show_default=False,
        rich_help_panel=RUNNING,
    ),
    worker: str = typer.Option(
        None,
        "--worker",
        metavar="I/N",
        help=(
            "Begin with the I-th of N shares (0/N to N-1/N), then help with the "
            "others. Default: torchrun's rank, or all."
        ),
        show_default=False,
        rich_help_panel=WORKERS,
    ),
    share_only: bool = typer.Option(
        False,
        "--share-only",
        help="End with one's own share: for machines that share no folder; --merge joins what they made.",
        rich_help_panel=WORKERS,
    ),
    verify: str = typer.Option(
        None,
        "--verify",
        metavar="STORE",
        help="Only check every checksum of a store.",
        show_default=False,
        rich_help_panel=TOOLS,
    ),
    stats: str = typer.Option(
        None,
        "--stats",
        metavar="STORE",
        help="Only print what a store holds and took, as JSON.",
        show_default=False,
        rich_help_panel=TOOLS,
    ),
    merge: list[str] = typer.Option(
        None,
        "--merge",
        metavar="STORE",
        help="Join stores into --out: parts of one store, or stores whose seeds follow each other. Give it for each.",
        show_default=False,
        rich_help_panel=TOOLS,
    ),
) -> None:
    """Make pairs of noise and a teacher's output, to train students on.

    The same command again continues a store that was interrupted in any way, and makes shards again that are missing;
    with a larger --n it adds to the store. Any number of workers
    may run it at once on the same folder or URL (the same command started again, torchrun, a Slurm array, --worker on
    separate machines): each takes unfinished shards, and those of a worker that died.

    A pair is a function of its seed and its label or prompt. With the same --batch, --threads, precision and kind of
    device (kept in manifest.json and taken by every worker) the files have the same bytes however many workers made
    them; with others the values agree to rounding, about 1e-5.
    """
    tools = {"--verify": verify, "--stats": stats, "--merge": merge}
    if len(given := [name for name, value in tools.items() if value]) > 1:
        raise UserError(f"{' and '.join(given)} are two different things", "give one of them")
    if verify is not None:
        return _verify(verify)
    if stats is not None:
        return _stats(stats)
    if merge:
        return _merge(merge, out)
    texts = None
    if prompts is not None:
        from d2o.data.prompt_files import open_prompts

        texts = open_prompts(prompts)  # a mistake in it is found before the teacher is fetched
        n = len(texts) * max(per_prompt, 1) if n is None else n
    from d2o.diffusion.guidance import parse_cfg
    from d2o.teachers.base import guided_name

    scale = parse_cfg(cfg)
    _check_given(teacher, n, prompts, cfg)
    check_guide(guide, scale != 1)

    from d2o.data.pair_settings import PairSettings
    from d2o.runtime import stop_flag
    from d2o.teachers.compute import Compute
    from d2o.teachers.generate import Share, make_pairs

    settings = PairSettings(
        guided_name(teacher, guide),
        n,
        seed,
        solver,
        steps,
        spacing,
        final,
        eta,
        s_churn,
        s_min,
        s_max,
        s_noise,
        scale,
        labels,
        prompts,
        per_prompt,
        rewire,
        shard_size,
        dtype,
        store_noise,
        decode,
        sdxl_uncond,
    )
    settings.check()
    if out is not None:
        _check_folder(out)
    compute = Compute(batch, threads, precision, channels_last, compile)
    share = Share.parse(worker, share_only)
    with stop_flag() as stop, console.progress_bar("pairs", "pairs") as progress:
        model = open_teacher(settings.teacher, device)
        if out is None:
            out = str(settings.resolved(model.spec.solver, model.spec.steps).folder(precision))
            console.say(f"the store is {out} (--out names another)")
            _check_folder(out)
        store = make_pairs(
            settings,
            out,
            compute=compute,
            share=share,
            say=console.say,
            progress=progress,
            stop=stop,
            teacher=model,
            prompts=texts,
        )
    if store is not None:
        made = store.settings
        calls = f"{made.nfe} network evaluations" + (f" ({made.forwards} passes)" if made.forwards != made.nfe else "")
        console.say(f"{out}: {len(store):,} pairs of {calls} in {len(store.units)} shards")


def _check_given(teacher: str | None, n: int | None, prompts: str | None, cfg: str) -> None:
    """UserError: what cannot be done without is missing; all of it, with an example for this teacher. Says what nothing
    can be trained on."""
    from d2o.methods.teachers import methods_for
    from d2o.teachers.kinds import expected_kind

    kind = None if teacher is None else expected_kind(teacher)
    text = kind is not None and kind.text
    lacking = [("--teacher", "any that `d2o teachers` lists, or the path of one")] if teacher is None else []
    lacking += [("--n", "how many pairs" + (" (without it one for every prompt)" if text else ""))] if n is None else []
    if text and prompts is None:
        files = "a .txt file (one a line), .jsonl or .parquet (column prompt, text or caption)"
        lacking.append(("--prompts", f"{teacher!r} is conditioned on text: {files}"))
    if lacking:
        words = [
            "d2o pairs --teacher",
            teacher or "digits",
            *(["--prompts prompts.txt"] if text else []),
            f"--n {n or 8192}",
        ]
        words += [] if cfg == "1" else [f"--cfg {cfg}"]
        rows = [f"{name:<10} {what}" for name, what in lacking] if len(lacking) > 1 or text else []
        hint = "\n".join(
            [*rows, f"for example: {' '.join(words)}", "the store goes under runs/pairs unless --out says where"]
        )
        names = " and ".join(name for name, _ in lacking)
        raise UserError(f"{names} {'is' if len(lacking) == 1 else 'are'} missing", hint)
    if kind is not None and not methods_for(kind):
        console.say(
            f"note: teacher {teacher!r} {kind.words()}; no method of `d2o train` takes its pairs yet (d2o.PairStore"
            " reads them)"
        )


def _check_folder(out: str) -> None:
    """UserError: a store cannot be made there. (Of a URL it shows later.)"""
    from d2o.interop.outputs import check_output
    from d2o.work.objects import local_path

    if (folder := local_path(out)) is not None:
        check_output(folder, folder=True)


def _verify(path: str) -> None:
    from d2o.data.pair_files import open_store
    from d2o.data.pair_tools import verify_store

    with console.progress_bar("verify", "pairs") as progress:
        problems = verify_store(path, progress)
    settings = open_store(path)[2]
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        hint = f"to repair: delete the files named, if they exist, and run: {settings.command(path)}"
        raise UserError(f"{path} has {len(problems)} bad shards:\n  " + "\n  ".join(problems[:20] + more), hint)
    count = f"{len(settings.units())} shards ({settings.n:,} pairs)"
    console.out.print(f"{path}: all {count} are as they were made", markup=False)


def _stats(path: str) -> None:
    import json

    from d2o.data.pair_tools import stats

    console.out.print_json(json.dumps(stats(path)))


def _merge(sources: list[str], out: str | None) -> None:
    from d2o.data.pair_tools import merge_stores

    if out is None:
        raise UserError("--out is missing", "for example: d2o pairs --merge part1/ --merge part2/ --out whole/")
    with console.progress_bar("merge", "pairs") as progress:
        n = merge_stores(sources, out, progress)
    console.say(f"{out}: {n:,} pairs")
