"""A page on which a person says which of two clips is better, for the scripts that learn a reward from that.

There are two ways. In the loop: a run with `--teacher human` writes pairs of its newest fragments into its
folder and takes the answers from there; point this script at that folder. Label first: with `--pairs` this
script plays the policy of a run, writes pairs of what it saw into a folder of their own, and serves these;
any run of the same task and fragment length can learn from them.

    python sobirl_rlhf.py --env-id HalfCheetah-v4 --teacher human --label-budget 200 --warmup-pairs 40
    python label_preferences.py runs/HalfCheetah-v4__sobirl_rlhf__1__1790000000

    python label_preferences.py runs/HalfCheetah-v4__sobirl_rlhf__1__1790000000 --pairs 200  # label first
    python sobirl_rlhf.py --env-id HalfCheetah-v4 --reward-update drlhf --labels NEW/preferences/labels.jsonl

It prints an address; open it in a browser. Keys: left and right arrow for the better clip, down for equal,
s to skip, u to undo, r to replay. The page never shows a reward; which fragment is on the left is random;
after each ten answers an old pair is shown again, with its sides exchanged, and how often the answers agree
is shown below. Nothing is lost when the server is killed: an answer is on disk before the next pair is shown.

`preferences/labels.jsonl` has one line for each answer: pair, answer, label (1: the first fragment is
preferred, 0: the second, 0.5: equal, null: skipped), left (which fragment was on the left), seconds,
labeller, repeat (an old pair again), tab, time. Lines are only ever appended: "undo" takes the last answer
to its pair back. docs/label_preferences.md tells more, also about who can reach the page.
"""

# ---- Imports -----------------------------------------------------------------------------------------
import contextlib
import hashlib
import hmac
import importlib.util
import io
import json
import multiprocessing
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import filelock
import flask
import gymnasium as gym
import numpy as np
import pydantic
import torch
import torch.nn as nn
import tyro
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from werkzeug.serving import WSGIRequestHandler, make_server


# ---- Checked arguments (shared) ----------------------------------------------------------------------
class BadInput(Exception):
    """One sentence that names the argument, what is wrong and what would be right; exit status 2."""


class CheckedArgs(pydantic.BaseModel, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="strings"):
    """Arguments whose ranges are checked whenever they are made, from a command line or in Python."""

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def one_sentence(cls, values, check):
        """Raise BadInput for the first argument that is out of its range."""
        try:
            return check(values)
        except pydantic.ValidationError as error:
            wrong = error.errors()[0]
            name, message = str(wrong["loc"][0]).replace("_", "-"), wrong["msg"].removeprefix("Value error, ")
            raise BadInput(f"--{name} is {wrong['input']!r}: {message}") from None


# ---- Arguments ---------------------------------------------------------------------------------------
class Args(CheckedArgs):
    """What is labelled, by whom, and who can reach the page."""

    source: tyro.conf.Positional[Path]
    """folder of a run with --teacher human, or one that --pairs made; with --pairs a run or its model.pt"""
    labeller: str = os.environ.get("USER") or "someone"
    """name that stands in the labels"""
    question: str = "Which clip is better?"
    """what the page asks"""
    repeat_every: NonNegativeInt = 10
    """answers after which an old pair is shown again, to measure agreement; 0: never"""
    clip_seconds: Annotated[float, Field(gt=0, le=60)] = 2.0
    """how long a clip plays; fragments of MuJoCo tasks are often shorter, and are slowed down"""
    clip_size: Annotated[int, Field(ge=32, le=1024)] = 256
    """height and width of a clip in pixels"""
    host: str = "127.0.0.1"
    """address to listen on; any other than this one lets other machines reach the page"""
    port: Annotated[int, Field(ge=0, le=65535)] = 8765
    """port to listen on; 0: any that is free"""

    pairs: NonNegativeInt = 0
    """label first: so many pairs of fragments of SOURCE's policy, in a new folder in --run-dir"""
    fragment_length: PositiveInt = 25
    """steps of a fragment; a run that uses the labels needs the same"""
    noise: Annotated[float, Field(ge=0, le=10)] = 0.3
    """standard deviation of the noise on the policy's actions, which are in [-1, 1]; so clips differ"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """seed of the environment, the noise and the pairs"""
    run_dir: Path = Path("runs")
    """where --pairs makes its folder: {run_dir}/{env_id}__label_preferences__{seed}__{time}"""


# ---- Fragments (shared) ------------------------------------------------------------------------------
def fragment_windows(valid: Tensor, length: int) -> Tensor:
    """First step and environment (K, 2) of all fragments of `length` transitions within one episode.

    valid (T, N) is 1 for a transition, 0 for the reset that follows each episode's end: a window with no
    reset in it crosses no end.
    """
    counted = nn.functional.pad(valid.cumsum(0), (0, 0, 1, 0))
    return (counted[length:] - counted[:-length] == length).nonzero()


def draw_pairs(windows: Tensor, count: int, length: int, *arrays: Tensor) -> list[Tensor]:
    """`count` pairs of two different fragments, drawn uniformly from windows (K, 2): of each array
    (T, N, ...) the part (count, 2, length, ...). No pair if there are fewer than two windows."""
    count = count if len(windows) > 1 else 0
    first = torch.randint(max(1, len(windows)), (count,))
    second = (first + torch.randint(1, max(2, len(windows)), (count,))) % max(1, len(windows))
    starts, envs = windows[torch.stack([first, second], 1)].unbind(-1)
    steps = starts.unsqueeze(-1) + torch.arange(length)
    return [array[steps, envs.unsqueeze(-1)] for array in arrays]


# ---- Labels by people (shared) -----------------------------------------------------------------------
def ask_people(folder: Path, args: Args, **columns: Tensor) -> None:
    """Write pairs, columns (P, 2, ...), where label_preferences.py finds them: what the reward network gets,
    and to be drawn `states` (P, 2, L, nq), MuJoCo's positions, or `frames` (P, 2, L + 3, 84, 84), uint8."""
    folder.mkdir(exist_ok=True)
    used = [*pairs_asked(folder), *read_labels(folder / "labels.jsonl")]
    for number, pair in enumerate(zip(*columns.values()), max(used, default=-1) + 1):
        saved = {"pair": number, "env_id": args.env_id, "env_kwargs": args.env_kwargs}
        saved |= {name: each.clone() for name, each in zip(columns, pair)}  # a view is saved as a whole
        write_atomically(folder / f"{number:07}.pt", saved)


def pairs_asked(folder: Path) -> list[int]:
    """The numbers of the pairs that `ask_people` has written to the folder and that are there, in order."""
    return sorted(int(file.stem) for file in folder.glob("*.pt"))


def read_labels(file: Path) -> dict[int, float | None]:
    """Label y of each pair that people have answered, by its number; None: they could not tell.

    A line of labels.jsonl is an answer, and the last one to a pair counts. Not so those to a pair that was
    shown again, which measure agreement, and a line without an end, as while it is written or after a crash.
    Raises BadInput if another line is no answer.
    """
    labels = {}
    for line in file.read_text(errors="replace").split("\n")[:-1] if file.exists() else ():
        try:
            row = json.loads(line)
            if not row["repeat"]:
                labels.pop(row["pair"], None)
                labels |= {} if row["answer"] == "undo" else {row["pair"]: row["label"]}
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{file} is damaged: {line[:80]!r} is no answer; mend or remove it") from error
    return labels


def labelled_pairs(file: Path, taken: set[int]) -> tuple[list[dict], Tensor]:
    """The pairs (P,) that people have labelled, as `ask_people` wrote them beside this file, and their labels
    (P,); but for deleted ones and those whose numbers are in `taken`, to which these are added."""
    new = {*pairs_asked(file.parent)} - taken
    labels = {n: y for n, y in read_labels(file).items() if y is not None and n in new}
    taken.update(labels)
    pairs = [torch.load(file.parent / f"{n:07}.pt", weights_only=True) for n in labels]
    return pairs, torch.tensor(list(labels.values())).float()


# ---- Label first: fragments of a policy --------------------------------------------------------------
def write_atomically(path: Path, content: dict) -> None:
    """Replace `path` by what torch saves: after a crash the old or the new content is there."""
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)  # a full disk should not stay full of half a file


def load_run(source: Path) -> tuple:
    """Module, arguments and policy of a run folder or a model.pt, whose script lies beside this one.

    The policy maps raw observations to actions as the task takes them. Raises BadInput.
    """
    folder = source if source.is_dir() else source.parent
    models = [folder / "model.pt", folder / "checkpoint.pt"] if source.is_dir() else [source]
    try:
        model = next((path for path in models if path.exists()), models[0])
        if (folder / "args.json").exists():
            made = json.loads((folder / "args.json").read_text())
        else:
            saved = torch.load(model, map_location="cpu", weights_only=True)
            made = {"script": saved["script"], "args": {"env_id": saved["env_id"]}}
        script = Path(__file__).with_name(Path(made["script"]).name)
        spec = importlib.util.spec_from_file_location(f"played_{script.stem}", script)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where pydantic looks for the types of its arguments
        spec.loader.exec_module(module)
        ours = {} if hasattr(module, "game_name") else {"env_backend": "sync", "num_envs": 1}  # Atari's own
        args = module.Args(**made["args"] | ours)
        return module, args, module.load_policy(model)
    except Exception as error:  # a damaged archive raises errors of many kinds
        needs = "it must be a run folder with model.pt or checkpoint.pt, or a model.pt"
        raise BadInput(f"{source}: {needs}: {type(error).__name__}: {error}") from error


def play_mujoco(module, run_args, agent: nn.Module, args: Args, steps: int) -> tuple[Tensor, dict]:
    """Play the policy with noise: which steps (T, 1) are transitions, 1 or 0; and `inputs` (T, 1, D+A), the
    observations and the actions in [-1, 1], and `states` (T, 1, nq). Raises BadInput."""
    try:
        envs, observation_space, space = module.make_envs(run_args, args.seed)
        env, low, high = envs.unwrapped.envs[0].unwrapped, torch.tensor(space.low), torch.tensor(space.high)
        states = torch.zeros(steps, 1, env.model.nq)
    except (module.BadInput, AttributeError) as error:
        raise BadInput(f"{args.source}: a MuJoCo task with continuous actions is needed: {error}") from error
    inputs, valid = torch.zeros(steps, 1, observation_space.shape[0] + len(low)), torch.zeros(steps, 1)
    obs, ended = torch.tensor(envs.reset()[0]).float(), False
    for t in range(steps):
        actions = 2 * (agent(obs) - low) / (high - low) - 1
        actions = (actions + args.noise * torch.randn_like(actions)).clamp(-1, 1)
        inputs[t], states[t], valid[t] = torch.cat([obs, actions], -1), torch.tensor(env.data.qpos), not ended
        raw_obs, _, ends, cut, _ = envs.step((low + 0.5 * (actions + 1) * (high - low)).numpy())
        obs, ended = torch.tensor(raw_obs).float(), bool(ends | cut)
    return valid, {"inputs": inputs, "states": states}


def play_atari(module, run_args, agent: nn.Module, args: Args, steps: int) -> tuple[Tensor, dict]:
    """The same on Atari, without noise on the actions: `images` (T, 1, 4, 84, 84) and `actions` (T, 1)."""
    envs = module.make_envs(run_args, 1, args.seed)
    images, actions = torch.zeros(steps, 1, 4, 84, 84, dtype=torch.uint8), torch.zeros(steps, 1, dtype=int)
    valid, now, ended = torch.zeros(steps, 1), envs.reset()[0], False
    for t in range(steps):
        images[t], valid[t] = torch.from_numpy(now), not ended
        actions[t] = agent(images[t])
        now, _, ends, cut, _ = envs.step(actions[t].numpy())
        ended = bool(ends | cut)
    return valid, {"images": images, "actions": actions}


def play(args: Args) -> Path:
    """Play the policy of SOURCE, write `args.pairs` pairs of its fragments, and return their folder. Raises
    BadInput before anything is written."""
    module, run_args, agent = load_run(args.source)
    torch.manual_seed(args.seed)
    steps, length = 2 * args.pairs * args.fragment_length, args.fragment_length
    play_task = play_atari if hasattr(module, "game_name") else play_mujoco
    with torch.no_grad():
        valid, columns = play_task(module, run_args, agent, args, steps)
    windows = fragment_windows(valid, length)
    if len(windows) < 2:
        raise BadInput(f"--fragment-length {length}: no episode in {steps} steps was longer")
    pairs = dict(zip(columns, draw_pairs(windows, args.pairs, length, *columns.values())))
    if "images" in pairs:  # of the 4 images of a step, 3 are those of the steps before
        images = pairs.pop("images")
        pairs["frames"] = torch.cat([images[:, :, 0, :3], images[:, :, :, 3]], 2)
    name = f"{run_args.env_id}__{Path(__file__).stem}__{args.seed}__{int(time.time())}"
    folder = args.run_dir / re.sub(r"[/:\\\s]", "_", name)
    try:
        folder.mkdir(parents=True)
        ask_people(folder / "preferences", run_args, **pairs)
    except OSError as error:
        raise BadInput(f"--run-dir: {error}; name another or make it writable") from error
    return folder


# ---- Clips -------------------------------------------------------------------------------------------
class Scene:
    """A MuJoCo task that is drawn with a camera that follows the robot; the floor's squares show its speed.
    Without shadows and antialiasing, for a CPU then takes a seventh of the time."""

    def __init__(self, env_id: str, env_kwargs: str, size: int):
        import mujoco  # reads MUJOCO_GL, which has been set only now

        self.env = gym.make(env_id, **json.loads(env_kwargs)).unwrapped
        model, self.camera = self.env.model, mujoco.MjvCamera()
        model.vis.quality.offsamples, model.vis.global_.offwidth, model.vis.global_.offheight = 0, size, size
        self.renderer = mujoco.Renderer(model, size, size)
        for costly in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.renderer.scene.flags[costly] = 0
        mujoco.mjv_defaultFreeCamera(model, self.camera)
        self.camera.type, self.camera.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, 1
        self.camera.elevation = -15  # degrees
        chosen = self.env.mujoco_renderer.default_cam_config or {}
        self.camera.distance = chosen.get("distance", self.camera.distance)

    def draw(self, states: Tensor) -> list[np.ndarray]:
        """Images (H, W, 3) of positions (L, nq)."""
        images = []
        for qpos in states.double().numpy():
            self.env.set_state(qpos, np.zeros(self.env.model.nv))
            self.renderer.update_scene(self.env.data, self.camera)
            images.append(self.renderer.render().copy())
        return images


def animation(left: list[np.ndarray], right: list[np.ndarray], seconds: float, size: int) -> bytes:
    """Both sequences of images (H, W) or (H, W, 3) side by side as one animated WebP, so that they cannot
    get out of step; it loops, and rests at its end for a moment."""
    frames = []
    for images in zip(left, right):
        frame = Image.new("RGB", (2 * size + size // 16, size), "white")
        for side, image in enumerate(images):
            drawn = Image.fromarray(image).convert("RGB").resize((size, size))
            frame.paste(drawn, (side * (size + size // 16), 0))
        frames.append(frame)
    durations = [round(1000 * seconds / len(frames))] * (len(frames) - 1) + [500]
    file, how = io.BytesIO(), {"duration": durations, "loop": 0, "quality": 80, "method": 0}
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], **how)
    return file.getvalue()


def draw_clips(connection, seconds: float, size: int) -> None:
    """A process of its own, which a failing driver may take down: receives (path of a pair, which fragment is
    on the left), sends the clip or a sentence why there is none, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to answer
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    scenes = {}
    with contextlib.suppress(EOFError, OSError), warnings.catch_warnings(action="ignore"):
        while True:
            path, left = connection.recv()
            try:
                pair = torch.load(path, weights_only=True)
                if "frames" in pair:
                    fragments = [list(each.numpy()) for each in pair["frames"]]
                else:
                    task = pair["env_id"], pair["env_kwargs"]
                    if task not in scenes:
                        scenes[task] = Scene(*task, size)
                    fragments = [scenes[task].draw(each) for each in pair["states"]]
                connection.send(animation(fragments[left], fragments[1 - left], seconds, size))
            except Exception as error:  # whatever task and driver raise
                connection.send(f"cannot draw: {type(error).__name__}: {error}; see MUJOCO_GL")


class Drawer:
    """Clips of the pairs in a folder, drawn by a child process; the newest are kept in memory."""

    def __init__(self, folder: Path, seconds: float, size: int):
        self.folder, self.settings, self.clips = folder, (seconds, size), {}
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        """Start the child."""
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.child = context.Process(target=draw_clips, args=(other, *self.settings), daemon=True)
        self.child.start()
        other.close()

    def clip(self, pair: int, left: int) -> bytes:
        """The clip of a pair with this fragment (0 or 1) on the left. Raises RuntimeError with a reason."""
        path = self.folder / f"{pair:07}.pt"
        with self.lock:
            # A number is used again if its pair was deleted before it was answered.
            key = pair, left, path.stat().st_mtime_ns if path.exists() else None
            if key not in self.clips:
                self.clips[key] = self.draw(path, left)
                for oldest in list(self.clips)[:-32]:
                    del self.clips[oldest]
            return self.clips[key]

    def draw(self, path: Path, left: int) -> bytes:
        """The same, by the child."""
        try:
            self.connection.send((path, left))
            found = self.connection.recv() if self.connection.poll(120) else "cannot draw: no clip in 120 s"
        except (EOFError, OSError):
            found = "cannot draw: the process that draws has died; see MUJOCO_GL"
        if isinstance(found, str):
            self.child.kill()  # it may be the driver's state
            self.start()
            raise RuntimeError(found)
        return found


# ---- Which pair is shown, what is answered -----------------------------------------------------------
class Labels:
    """The answers to the pairs in a folder, and which pair is shown to whom. Methods may be called from any
    thread; what they have accepted is on disk.

    A question is (pair, repeat): repeat is False for a pair's first time, True for its second. It is lent to
    one tab of a browser for LEASE seconds, and again when the tab asks again, so that no two tabs answer one.
    """

    LEASE = 90.0
    ANSWERS = ("left", "right", "equal", "skip")

    def __init__(self, folder: Path, labeller: str, repeat_every: int):
        self.folder, self.labeller, self.repeat_every = folder, labeller, repeat_every
        self.lock, self.leases = threading.RLock(), {}
        self.path = folder / "labels.jsonl"
        self.answers = {}  # of each question the line that counts
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole.splitlines():
            self.count(json.loads(line))
        self.file = open(self.path, "ab", buffering=0)
        self.file.truncate(len(whole))  # a line that a kill cut off was never confirmed

    def count(self, row: dict) -> None:
        """Take a line into account."""
        question = row["pair"], row["repeat"]
        self.answers.pop(question, None)  # the last one is the newest in the order of the dictionary
        if row["answer"] != "undo":
            self.answers[question] = row

    def write(self, row: dict) -> None:
        """Append a line; it is on the disk when this returns. Raises OSError, and then nothing is there."""
        row |= {"labeller": self.labeller, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        line, end = (json.dumps(row) + "\n").encode(), os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(line) < len(line):
                raise OSError("the disk is full")
            os.fsync(self.file.fileno())
        except OSError:
            self.file.truncate(end)
            raise
        self.count(row)

    def left(self, pair: int, repeat: bool) -> int:
        """Which fragment, 0 or 1, is on the left: half the pairs each, the other one when it is repeated."""
        digest = hashlib.sha256(f"{self.folder.resolve().parent.name} {pair}".encode()).digest()
        return digest[0] % 2 ^ repeat

    def open_questions(self, tab: str) -> list[tuple[int, bool]]:
        """What may be shown to this tab, in order: what it has, a repeat if one is due, the newest pairs."""
        now = time.monotonic()
        self.leases = {key: lease for key, lease in self.leases.items() if lease[1] > now}
        mine = [key for key, lease in self.leases.items() if lease[0] == tab]
        taken = {key for key in self.leases if key not in mine} | self.answers.keys()
        first = [pair for pair, repeat in self.answers if not repeat]
        repeats = sum(repeat for _, repeat in {*self.answers, *self.leases})
        due = self.repeat_every and len(first) // self.repeat_every > repeats
        again = [(pair, True) for pair in first if self.answers[pair, False]["answer"] != "skip"]
        asked = pairs_asked(self.folder)
        found = *mine, *(again[:-2] if due else ()), *((pair, False) for pair in reversed(asked))
        return [key for key in found if key not in taken and key[0] in asked]

    def next(self, tab: str) -> dict | None:
        """A question for this tab, the same until it is answered; None if no pair is left."""
        with self.lock:
            for pair, repeat in self.open_questions(tab)[:1]:
                self.leases[pair, repeat] = tab, time.monotonic() + self.LEASE
                return {"pair": pair, "repeat": repeat, "left": self.left(pair, repeat)}
        return None

    def coming(self, tab: str) -> list[tuple[int, int]]:
        """Clips that are likely next, to draw them in advance: (pair, which fragment is on the left)."""
        with self.lock:
            return [(pair, self.left(pair, repeat)) for pair, repeat in self.open_questions(tab)[1:3]]

    def answer(self, tab: str, pair: int, repeat: bool, answer: str, seconds: float) -> bool:
        """Write an answer; False if somebody else has answered the question, or is looking at it now."""
        with self.lock:
            question, left = (pair, repeat), self.left(pair, repeat)
            tabs = {key: lease[0] for key, lease in self.leases.items() if lease[1] > time.monotonic()}
            if question in self.answers or tabs.get(question, tab) != tab:
                return False
            label = {"left": 1.0 - left, "right": float(left), "equal": 0.5}.get(answer)
            row = {"pair": pair, "answer": answer, "label": label, "left": left, "seconds": seconds}
            self.write(row | {"repeat": repeat, "tab": tab})
            self.leases.pop(question, None)
            return True

    def undo(self, tab: str) -> bool:
        """Take this tab's last answer back and show its question again; False if there is none."""
        with self.lock:
            for question, row in reversed(self.answers.items()):
                if row["tab"] == tab:
                    old = {"pair": row["pair"], "answer": "undo", "repeat": row["repeat"], "tab": tab}
                    self.leases = {key: lease for key, lease in self.leases.items() if lease[0] != tab}
                    self.write(old)
                    self.leases[question] = tab, time.monotonic() + self.LEASE
                    return True
        return False

    def agreement(self) -> tuple[int, int]:
        """How many repeated pairs got the same label again, of how many."""
        with self.lock:
            first = {pair: row["label"] for (pair, repeat), row in self.answers.items() if not repeat}
            again = {pair: row["label"] for (pair, repeat), row in self.answers.items() if repeat}
        return sum(first.get(pair) == label for pair, label in again.items()), len(again)

    def progress(self) -> dict:
        """What the page shows: answered pairs, and the agreement."""
        same, repeated = self.agreement()
        with self.lock:
            return {"answered": sum(not repeat for _, repeat in self.answers), "agree": [same, repeated]}


# ---- The page ----------------------------------------------------------------------------------------
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Preferences</title>
<link rel="icon" href="data:,">
<style nonce="NONCE">
body { font: 16px/1.5 sans-serif; max-width: 52rem; margin: auto; padding: 1rem; text-align: center; }
#stage { min-height: 17rem; }
#clip { max-width: 100%; }
#note { min-height: 1.5em; color: #a00; }
button { font: inherit; padding: .5rem 1rem; margin: .2rem; }
kbd { opacity: .6; }
</style>
<h1 id="question"></h1>
<div id="stage"><img id="clip" alt="Two clips side by side" hidden></div>
<div>
<button data-answer="left">Left <kbd>&larr;</kbd></button>
<button data-answer="equal">Equal <kbd>&darr;</kbd></button>
<button data-answer="right">Right <kbd>&rarr;</kbd></button>
</div>
<div>
<button data-answer="skip">Skip <kbd>s</kbd></button>
<button id="undo">Undo <kbd>u</kbd></button>
<button id="replay">Replay <kbd>r</kbd></button>
</div>
<p id="progress"></p>
<p id="note" role="status"></p>
<script nonce="NONCE">
const find = id => document.getElementById(id);
const clip = find("clip");
const keys = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "equal", s: "skip"};
const tab = sessionStorage.tab ||= Array.from(crypto.getRandomValues(new Uint32Array(4))).join("-");
let shown = null;  // the question on the screen, until it is answered
let bytes = null, since = 0, asked = 0;
let trouble = "";  // why the last key did nothing, said until the next
let line = Promise.resolve(), waiting = 0;  // requests, one after the other, and how many are not done

function hide() {
  shown = bytes = null;
  clip.hidden = true;
}

function replay() {  // an animation starts again when it gets an address that the browser has not seen
  if (!bytes) return hide(), trouble = "", act("next");
  URL.revokeObjectURL(clip.src);
  clip.src = URL.createObjectURL(bytes);
}

async function checked(reply) {
  if (!reply.ok) throw new Error(await reply.text());
  return reply;
}

async function ask(what, body) {
  asked = performance.now();
  const headers = {"Content-Type": "application/json"};
  const sent = {method: "POST", headers, body: JSON.stringify({tab, ...body})};
  const state = await (await checked(await fetch(what, sent))).json();
  find("question").textContent = state.question;
  const [same, repeated] = state.agree;
  const agreement = repeated ? `; the same answer again: ${same} of ${repeated}` : "";
  find("progress").textContent = `${state.answered} of ${state.budget}${agreement}`;
  const next = state.next;
  if (waiting > 1) return;  // the one behind knows better
  if (next === null) {
    hide();
    const done = state.answered >= state.budget;
    find("note").textContent = done ? "All pairs are answered. Thank you." : "Waiting for pairs.";
  } else if (shown?.pair !== next.pair || shown.repeat !== next.repeat) {
    hide();
    shown = next;  // so that it can be skipped if it cannot be drawn
    find("note").textContent = "Drawing.";
    bytes = await (await checked(await fetch(`clip/${next.pair}/${next.left}`))).blob();
    replay();
    await clip.decode();
    clip.hidden = false;
    find("note").textContent = trouble;
    since = performance.now();
  }
}

function act(what, body = {}) {
  waiting += 1;
  line = line.then(() => ask(what, body)).catch(error => {
    find("note").textContent = error.message;
    if (what !== "next") trouble = error.message;
  });
  line = line.then(() => { waiting -= 1; });
}

function answer(word) {
  if (!shown || clip.hidden && word !== "skip") return;
  const {pair, repeat} = shown;
  shown = null, trouble = "";
  act("answer", {pair, repeat, answer: word, seconds: (performance.now() - since) / 1000});
}

function undo() {
  shown = null, trouble = "";
  act("undo");
}

document.addEventListener("keydown", event => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (keys[event.key]) answer(keys[event.key]);
  else if (event.key === "u") undo();
  else if (event.key === "r") replay();
  else return;
  event.preventDefault();
});
for (const button of document.querySelectorAll("[data-answer]")) {
  button.onclick = () => answer(button.dataset.answer);
}
find("undo").onclick = undo;
find("replay").onclick = replay;
act("next");
setInterval(() => { if (!waiting && (!shown || performance.now() - asked > 20000)) act("next"); }, 1000);
</script>
</html>
"""


class Question(pydantic.BaseModel, extra="forbid", strict=True):
    """What the page sends: who it is, and for an answer to what and which."""

    tab: Annotated[str, Field(min_length=1, max_length=64, pattern="^[0-9-]+$")]
    pair: Annotated[int, Field(ge=0)] = 0
    repeat: bool = False
    answer: str = ""
    seconds: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 0.0


def make_app(labels: Labels, drawer: Drawer, token: str, budget: int | None, args: Args) -> flask.Flask:
    """The page and what it asks for. Every address starts with the token, which is the only key: there is no
    cookie, so another site cannot act in the labeller's name. Only whole numbers of existing pairs choose a
    file."""
    app = flask.Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = 2000
    if args.host == "127.0.0.1":
        app.config["TRUSTED_HOSTS"] = ["127.0.0.1", "localhost"]  # against DNS rebinding

    @app.before_request
    def refuse_strangers():
        given = (flask.request.view_args or {}).pop("token", "")
        if not hmac.compare_digest(given.encode(), token.encode()):
            flask.abort(403)
        if flask.request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            flask.abort(403)

    @app.after_request
    def guard(reply: flask.Response):
        nonce = flask.g.get("nonce", "")
        policy = f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
        policy += "; img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'"
        reply.headers["Content-Security-Policy"] = f"{policy}; frame-ancestors 'none'"
        reply.headers["Referrer-Policy"] = "no-referrer"  # the address holds the token
        reply.headers["X-Content-Type-Options"] = "nosniff"
        reply.headers["Cache-Control"] = "no-store"
        return reply

    def body() -> Question:
        try:
            return Question(**flask.request.get_json())
        except (pydantic.ValidationError, TypeError):
            flask.abort(400)

    def state(tab: str) -> flask.Response:
        question = labels.next(tab)
        for pair in labels.coming(tab):
            threading.Thread(target=draw_in_advance, args=pair, daemon=True).start()
        asked = len(pairs_asked(labels.folder))
        found = labels.progress() | {"next": question, "budget": budget or asked, "question": args.question}
        return flask.jsonify(found)

    def draw_in_advance(pair: int, left: int) -> None:
        with contextlib.suppress(RuntimeError):  # it is said when the clip is asked for
            drawer.clip(pair, left)

    @app.errorhandler(OSError)
    def not_written(error: OSError):
        return flask.Response(f"Not saved: {error}", 507, mimetype="text/plain")

    @app.get("/<token>/")
    def page():
        flask.g.nonce = secrets.token_urlsafe(16)
        return PAGE.replace("NONCE", flask.g.nonce)

    @app.get("/<token>/clip/<int:pair>/<int(max=1):left>")
    def clip(pair: int, left: int):
        if pair not in pairs_asked(labels.folder):
            flask.abort(404)
        try:
            return flask.Response(drawer.clip(pair, left), mimetype="image/webp")
        except RuntimeError as error:
            return flask.Response(str(error), 503, mimetype="text/plain")

    @app.post("/<token>/next")
    def next_question():
        return state(body().tab)

    @app.post("/<token>/answer")
    def answer():
        sent = body()
        if sent.answer not in Labels.ANSWERS or sent.pair not in pairs_asked(labels.folder):
            flask.abort(400)
        if not labels.answer(sent.tab, sent.pair, sent.repeat, sent.answer, round(sent.seconds, 3)):
            return flask.Response("Another tab has this pair; here is a new one.", 409, mimetype="text/plain")
        return state(sent.tab)

    @app.post("/<token>/undo")
    def undo():
        sent = body()
        if not labels.undo(sent.tab):
            return flask.Response("There is nothing to undo.", 409, mimetype="text/plain")
        return state(sent.tab)

    return app


class Handler(WSGIRequestHandler):
    """Requests are not printed, since the address holds the token; a silent client is disconnected after
    30 s."""

    timeout = 30

    def log_request(self, *details) -> None:
        """Print nothing."""


# ---- Entry point -------------------------------------------------------------------------------------
def main(args: Args) -> None:
    """Make pairs if that is asked for, then serve the page until Ctrl-C. Raises BadInput."""
    try:
        listening = socket.create_server((args.host, args.port))
    except OSError as error:
        raise BadInput(
            f"--host {args.host} --port {args.port}: {error}; --port 0 takes a free one"
        ) from error
    folder = play(args) if args.pairs else args.source
    preferences, made = folder / "preferences", folder / "args.json"
    try:
        run_args = json.loads(made.read_text())["args"] if made.exists() else {}
        if not preferences.is_dir() and run_args.get("teacher") != "human":
            raise BadInput(f"{folder} has no pairs: it needs --teacher human, or use --pairs here")
        budget = run_args.get("label_budget")
        preferences.mkdir(exist_ok=True)
        lock = filelock.FileLock(preferences / ".lock").acquire(timeout=0)
        labels = Labels(preferences, args.labeller, args.repeat_every)
    except filelock.Timeout:
        raise BadInput(f"{folder} is being labelled through another server") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{made} or {preferences / 'labels.jsonl'} cannot be used: {error}") from error
    drawer = Drawer(preferences, args.clip_seconds, args.clip_size)
    token = secrets.token_urlsafe(24)
    app = make_app(labels, drawer, token, budget, args)
    how = {"threaded": True, "request_handler": Handler, "fd": listening.fileno()}
    server = make_server(args.host, args.port, app, **how)
    if args.host != "127.0.0.1":
        print(f"warning: whoever reaches {args.host} and knows the address can label; it is not encrypted")
    print(f"go on later with: python {Path(__file__).name} {folder}")
    print(f"open http://{args.host}:{listening.getsockname()[1]}/{token}/", flush=True)
    with lock, listening, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    same, repeated = labels.agreement()
    answered = labels.progress()["answered"]
    print(f"\n{answered} pairs answered, the same again {same} of {repeated}: {labels.path}")


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # where a task of the user's own may lie
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
