"""What differs between the simulated sites: block, lighting, cameras, table and task sentence."""

import hashlib
import random
import re
from dataclasses import dataclass

from certs.errors import DatasetError

RGB = tuple[float, float, float]
XYZ = tuple[float, float, float]

# One DNS label without its upper-case half: the name becomes a directory and a certificate name.
_SITE_NAME = re.compile(r"[a-z0-9-]{1,63}")

# The reach in which the gripper can still point straight down (lerobot-env-so101, pick_place_env):
# x 0.15 to 0.30 m before the base, y 0.10 m to either side.
REACH_X = (0.15, 0.30)
REACH_Y = (-0.10, 0.10)

_COLOURS: dict[str, RGB] = {
    "red": (0.85, 0.10, 0.10),
    "blue": (0.10, 0.25, 0.90),
    "purple": (0.55, 0.15, 0.75),
    "orange": (1.00, 0.45, 0.05),
    "white": (0.95, 0.95, 0.95),
    "green": (0.10, 0.65, 0.20),
}
_TABLES: tuple[RGB, ...] = (
    (0.75, 0.72, 0.68),
    (0.35, 0.40, 0.50),
    (0.50, 0.38, 0.26),
    (0.22, 0.24, 0.25),
)
_SENTENCES = (
    "Pick up the {block} block and place it on the {goal} mat.",
    "Put the {block} cube on the {goal} target.",
    "Move the {block} block to the {goal} circle.",
    "Grab the {block} cube and drop it onto the {goal} disc.",
)


@dataclass(frozen=True)
class SiteProfile:
    """One laboratory: colours as RGB in 0..1, lengths in metres in the robot's base frame."""

    block: str
    """Colour name of the block."""
    goal: str
    """Colour name of the mat that marks the goal."""
    block_x: tuple[float, float]
    block_y: tuple[float, float]
    """Region in which the block starts."""
    table: RGB
    camera_offset: XYZ
    """Displacement of the top camera from its nominal place."""
    light: XYZ
    """Position of the lamp."""
    brightness: float
    """Diffuse strength of the lamp, 0..1."""
    ambient: float
    """Strength of the light without direction, 0..1."""
    sentence: str
    """Task sentence with the fields ``{block}`` and ``{goal}``."""

    @property
    def task(self) -> str:
        """The sentence the policy is given."""
        return self.sentence.format(block=self.block, goal=self.goal)

    @property
    def block_rgb(self) -> RGB:
        """Colour of the block."""
        return _COLOURS[self.block]

    @property
    def goal_rgb(self) -> RGB:
        """Colour of the goal mat."""
        return _COLOURS[self.goal]


_NAMED = {
    # A bright laboratory; the block starts at the robot's left.
    "site-a": SiteProfile(
        block="red",
        goal="green",
        block_x=REACH_X,
        block_y=(0.0, 0.10),
        table=_TABLES[0],
        camera_offset=(0.0, 0.0, 0.0),
        light=(0.3, 0.4, 1.2),
        brightness=0.7,
        ambient=0.40,
        sentence=_SENTENCES[0],
    ),
    # A dimmer one with the camera moved aside; the block starts at the robot's right.
    "site-b": SiteProfile(
        block="blue",
        goal="orange",
        block_x=REACH_X,
        block_y=(-0.10, 0.0),
        table=_TABLES[2],
        camera_offset=(0.04, -0.08, 0.03),
        light=(0.6, -0.5, 0.9),
        brightness=0.5,
        ambient=0.25,
        sentence=_SENTENCES[1],
    ),
    # Near the base, on a dark table.
    "site-c": SiteProfile(
        block="white",
        goal="purple",
        block_x=(0.15, 0.22),
        block_y=REACH_Y,
        table=_TABLES[3],
        camera_offset=(-0.03, 0.07, -0.02),
        light=(-0.2, 0.5, 1.0),
        brightness=0.8,
        ambient=0.20,
        sentence=_SENTENCES[2],
    ),
    # Far from the base, in even light.
    "site-d": SiteProfile(
        block="purple",
        goal="white",
        block_x=(0.22, 0.30),
        block_y=REACH_Y,
        table=_TABLES[1],
        camera_offset=(0.05, 0.05, -0.03),
        light=(0.2, 0.0, 1.5),
        brightness=0.3,
        ambient=0.55,
        sentence=_SENTENCES[3],
    ),
}


def check_name(site: str) -> None:
    """Refuse a name that cannot be a site's, with DatasetError."""
    if not _SITE_NAME.fullmatch(site):
        raise DatasetError(
            f"{site!r} is not a site name: use 1 to 63 lower-case letters, digits and dashes."
        )


def profile_of(site: str) -> SiteProfile:
    """The profile of a named site, or for any other name one that follows from the name alone."""
    check_name(site)
    if site in _NAMED:
        return _NAMED[site]
    # Not hash(): it differs from process to process.
    rng = random.Random(hashlib.sha256(site.encode()).digest())  # noqa: S311
    block, goal = rng.sample(sorted(_COLOURS), 2)
    # Two thirds of the reach, so that regions differ and still hold a spread of starts.
    x = rng.uniform(REACH_X[0], REACH_X[0] + 0.05)
    y = rng.uniform(REACH_Y[0], REACH_Y[0] + 0.06)
    return SiteProfile(
        block=block,
        goal=goal,
        block_x=(x, x + 0.10),
        block_y=(y, y + 0.14),
        table=rng.choice(_TABLES),
        # As far as the camera can move with the whole reach still in view.
        camera_offset=(
            rng.uniform(-0.05, 0.05),
            rng.uniform(-0.08, 0.08),
            rng.uniform(-0.03, 0.03),
        ),
        light=(rng.uniform(-0.3, 0.7), rng.uniform(-0.6, 0.6), rng.uniform(0.8, 1.5)),
        brightness=rng.uniform(0.3, 0.8),
        ambient=rng.uniform(0.20, 0.55),
        sentence=rng.choice(_SENTENCES),
    )
