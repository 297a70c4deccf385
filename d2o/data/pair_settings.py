"""What a pair store holds: the settings it was made with, and its manifest."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from d2o.data.draws import check_range, draw_scales, label_mode
from d2o.data.pair_record import MAX_SHARDS
from d2o.diffusion.guidance import Range, check_cfg_values, show_cfg
from d2o.diffusion.noise import noise_for_seeds
from d2o.diffusion.solvers import Solver
from d2o.errors import UserError, unknown
from d2o.inputs import JsonObject
from d2o.version import __version__
from d2o.work.folder import Unit, cut

FORMAT = "d2o-pairs"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
REWIRES = ("none", "permute")
SDXL_UNCOND = ("zeros", "encode_empty")
REWIRED = "rewired pairs are permuted over the whole store, so that one of another size holds other pairs"


@dataclass(frozen=True)
class PairSettings:
    """What a store holds: `n` pairs with seeds `seed` .. `seed + n - 1`.

    `solver`, `steps`: the teacher's usual ones if None; the options behind them are those of
    `diffusion.solvers.Solver`. `cfg` 1 is no guidance; of a range (low, high) every pair
    has its own scale, which the store keeps; `labels` as `draws.label_mode` takes it; `prompts` a file (txt,
    jsonl, parquet), of which pair i has line (i // per_prompt) mod their number; `rewire` "permute" gives every noise
    the output of another one (Kang et al. 2024, appendix D: a student learns nothing from it); `dtype` of the targets
    on disk: fp32, fp16 or bf16; `decode` keeps the images, as uint8, beside the latents. `sdxl_uncond`, of Stable
    Diffusion XL alone: what guidance takes for no prompt; None: what the teacher does by itself (a store says which).
    """

    teacher: str
    n: int
    seed: int = 0
    solver: str | None = None
    steps: int | None = None
    spacing: str | None = None
    final: str = "scheduler"
    eta: float = 0.0
    s_churn: float = 40.0
    s_min: float = 0.05
    s_max: float = 50.0
    s_noise: float = 1.003
    cfg: float | Range = 1.0
    labels: str = "random"
    prompts: str | None = None
    per_prompt: int = 1
    rewire: str = "none"
    shard_size: int = 1024
    dtype: str = "fp32"
    store_noise: bool = False
    decode: bool = False
    sdxl_uncond: str | None = None

    def check(self) -> None:
        """UserError: a value out of range. (Whether labels, prompts and solver fit is known only with the teacher.)"""
        check_range(self.n, self.seed)
        # Which options a solver takes is known once there is one; ddim takes them all but the sde's, which are harmless
        # elsewhere.
        (self.ode if self.solver is not None else replace(self.ode, name="ddim")).check()
        for name in ("shard_size", "per_prompt"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if -(-self.n // self.shard_size) > MAX_SHARDS:
            raise UserError(
                f"{self.n:,} pairs in shards of {self.shard_size} are more than {MAX_SHARDS:,} files",
                "choose a larger shard_size",
            )
        check_cfg_values(self.cfg)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.rewire not in REWIRES:
            raise unknown("rewire", self.rewire, REWIRES)
        if self.sdxl_uncond not in (None, *SDXL_UNCOND):
            raise unknown("sdxl_uncond", str(self.sdxl_uncond), SDXL_UNCOND)

    def resolved(self, solver: str, steps: int) -> PairSettings:
        """With the teacher's usual solver and steps where none were given."""
        return replace(self, solver=self.solver or solver, steps=self.steps if self.steps is not None else steps)

    def first(self, n: int, path: str | Path) -> PairSettings:
        """Those of the store's first n pairs. UserError: there are fewer; they depend on how many follow."""
        if not 1 <= n <= self.n:
            raise UserError(
                f"{path} holds {self.n:,} pairs, not {n:,}",
                f"add to it: {replace(self, n=n).command(path)}" if n > 0 else "",
            )
        if n != self.n and self.rewire != "none":
            raise UserError(f"{path}: {REWIRED}; it holds {self.n:,}, not {n:,}", "take all, or make another store")
        return replace(self, n=n)

    @property
    def ode(self) -> Solver:
        """The solver. Its name and steps are Solver's own defaults as long as the settings are not `resolved`."""
        given = {
            field.name: getattr(self, field.name) for field in fields(Solver) if field.name not in ("name", "steps")
        }
        given |= {"name": self.solver} if self.solver is not None else {}
        given |= {"steps": self.steps} if self.steps is not None else {}
        return Solver(**given)

    @property
    def nfe(self) -> int:
        """Denoiser evaluations for one pair as the papers count them: a guided one counts once."""
        return self.ode.nfe

    @property
    def forwards(self) -> int:
        """Network passes for one pair: a guided evaluation makes two."""
        return self.ode.forwards(self.cfg)

    def to_dict(self) -> JsonObject:
        return {**asdict(self), "nfe": self.nfe, "forwards": self.forwards}

    @classmethod
    def from_manifest(cls, manifest: JsonObject) -> PairSettings:
        """The settings that a store was made with; an older one's lack what was the default then and is now. KeyError:
        not settings."""
        recorded = dict(manifest["settings"])
        if isinstance(cfg := recorded.get("cfg"), list):
            recorded["cfg"] = tuple(cfg)
        return cls(
            **{
                f.name: recorded[f.name] if f.default is MISSING else recorded.get(f.name, f.default)
                for f in fields(cls)
            }
        )

    def differences(self, other: PairSettings) -> list[str]:
        """Each setting in which `other` differs from these, as "steps: 18 -> 9". Teachers differ by weights, prompts by
        content: below."""
        names = [field.name for field in fields(self) if field.name not in ("teacher", "prompts")]
        if None in (self.sdxl_uncond, other.sdxl_uncond):  # one of them leaves it to the teacher
            names.remove("sdxl_uncond")
        return [
            f"{name}: {getattr(self, name)} -> {getattr(other, name)}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]

    def folder(self, precision: str = "fp32") -> Path:
        """Where the store is unless another place is given: a name made of the (resolved) settings, under runs/pairs.
        `precision` of the teacher's network."""
        words = [short_name(self.teacher), f"{self.solver}{self.steps}"]
        words += [self.spacing] if self.spacing else []
        words += ["x0"] if self.final != "scheduler" else []
        words += [f"eta{self.eta:g}"] if self.eta else []
        if self.solver == "sde":
            churn = {
                f"{name}{getattr(self, name):g}": getattr(self, name) == f.default
                for f in fields(self)
                if (name := f.name).startswith("s_")
            }
            words += [word for word, usual in churn.items() if not usual]
        words += [] if self.cfg == 1.0 else [f"cfg{show_cfg(self.cfg).replace(':', 'to')}"]
        words += ["encode_empty"] if self.sdxl_uncond == "encode_empty" else []
        words += [] if self.labels in ("random", "none", "text") else [self.labels.replace(",", "_")]
        words += (
            [Path(self.prompts).stem + (f"x{self.per_prompt}" if self.per_prompt > 1 else "")] if self.prompts else []
        )
        words += [] if self.rewire == "none" else [self.rewire]
        words += [word for word, plain in ((self.dtype, "fp32"), (f"net_{precision}", "net_fp32")) if word != plain]
        words += ["decoded"] if self.decode else []
        return Path("runs") / "pairs" / "-".join([*words, f"n{self.n}", f"seed{self.seed}"])

    def command(self, out: str | Path) -> str:
        """The command line that makes or continues the store."""
        words = ["d2o", "pairs", "--teacher", self.teacher, "--n", str(self.n), "--out", str(out)]
        for field in fields(self):
            value = getattr(self, field.name)
            if (
                field.name not in ("teacher", "n")
                and value != field.default
                and not (field.name == "labels" and value in ("none", "text"))
            ):
                option = "--" + field.name.replace("_", "-")
                shown = show_cfg(value) if isinstance(value, (float, tuple)) else str(value)
                words += [option] if value is True else [option, shown]
        return shlex.join(words)

    def units(self) -> list[Unit]:
        return cut(self.n, self.shard_size, "shard-{:05d}.safetensors")

    def prompt_numbers(self, start: int, n: int, count: int) -> np.ndarray:
        """Which of `count` prompts the pairs start .. start + n - 1 have."""
        return (np.arange(start, start + n) // self.per_prompt) % count

    def sources(self, start: int, n: int) -> np.ndarray:
        """The pairs whose noise (and label, or prompt) the targets of pairs start .. start + n - 1 were made from:
        their own, unless rewired."""
        if self.rewire == "none":
            return np.arange(start, start + n)
        return _permutation(self.n, self.seed)[start : start + n]

    def scales(self, start: int, n: int) -> torch.Tensor | None:
        """The guidance scales [n] float32 of the pairs start .. start + n - 1, where each has its own."""
        if not isinstance(self.cfg, tuple):
            return None
        return draw_scales([self.seed + int(i) for i in self.sources(start, n)], self.cfg)


def short_name(teacher: str) -> str:
    """A teacher's name for files: that of its file, folder or repository."""
    return Path(teacher).name.removesuffix(".safetensors").removesuffix(".pkl")


@functools.lru_cache(maxsize=1)
def _permutation(n: int, seed: int) -> np.ndarray:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()


def differences(old: JsonObject, new: JsonObject) -> list[str]:
    """What differs between two manifests that matters: other settings, another teacher, or other prompts."""
    found = PairSettings.from_manifest(old).differences(PairSettings.from_manifest(new))
    was, now = old["teacher"], new["teacher"]
    if was["sha256"] != now["sha256"]:
        name = f"{was['name']} -> {now['name']}" if was["name"] != now["name"] else was["name"]
        found.insert(0, f"teacher: {name} (weights {was['sha256'][:12]} -> {now['sha256'][:12]})")
    before, after = old.get("prompts"), new.get("prompts")
    if (before or {}).get("sha256") != (after or {}).get("sha256"):
        found.append(
            "prompts: "
            + " -> ".join(
                f"{p['path']} (sha256 {p['sha256'][:12]}, {p['count']:,})" if p else "none" for p in (before, after)
            )
        )
    return found


def with_n(manifest: JsonObject, n: int) -> JsonObject:
    """The manifest of a store of n pairs."""
    return {**manifest, "settings": {**manifest["settings"], "n": n}}


def new_manifest(
    settings: PairSettings,
    teacher: JsonObject,
    spec: JsonObject,
    compute: JsonObject,
    prompts: JsonObject | None = None,
) -> JsonObject:
    """The manifest of a store without any shards yet. `teacher`: name, sha256, licence; `prompts`: path, sha256,
    count."""
    labels = "text" if spec["condition"] == "text" else label_mode(settings.labels, spec["classes"], teacher["name"])
    record = {
        "format": FORMAT,
        "version": 1,
        "d2o": __version__,
        "settings": {**settings.to_dict(), "labels": labels},
        "teacher": teacher,
        "spec": spec,
        "compute": compute,
        "noise_probe": noise_probe(settings.seed, spec["shape"]),
        "shards": [],
    }
    return record if prompts is None else {**record, "prompts": prompts}


def noise_probe(seed: int, shape: Sequence[int]) -> list[float]:
    """The first few numbers of the first sample's noise."""
    return noise_for_seeds([seed], shape).flatten()[:8].tolist()


def check_probe(manifest: JsonObject, path: str | Path) -> None:
    """UserError when this torch draws other random numbers than the one that made the store. Rounding (another
    processor) is no matter."""
    settings = PairSettings.from_manifest(manifest)
    now = noise_probe(settings.seed, manifest["spec"]["shape"])
    if not settings.store_noise and not np.allclose(now, manifest["noise_probe"], rtol=0, atol=1e-4):
        maker = manifest["compute"]["torch"]
        raise UserError(
            f"{path} was made by torch {maker}; this torch, {torch.__version__}, draws other noise from the store's"
            " seeds",
            "use that torch, or make the store again (with --store-noise the noise is kept and never derived)",
        )
