"""The scale of scores: 0 = a random policy or worse, 1 = a reference level of the same kind of algorithm.

    python -m benchmark.reference            measures the random policies again and prints them (minutes)
    python -m benchmark.reference --write    and writes them to reference.json, the scale of every score

`reference.json` is the only place of these numbers. Its reference levels are published ones or constants,
each with its source, and are never taken from this repository's own runs: a scale that moved with the results
would hide them. `by_script` has those of scripts whose algorithm is of another kind than PPO.
"""

import functools
import json
import warnings
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import pydantic
import tyro

from benchmark.machine import read_as, write_atomically
from benchmark.suites import BadSuite

REFERENCE = Path(__file__).parent / "reference.json"
MEASURED = "uniform actions, measured by `python -m benchmark.reference`"


class Args(pydantic.BaseModel):
    """Which episodes are measured."""

    episodes: pydantic.PositiveInt = 100
    """episodes of the random policy on each environment, in [1, inf)"""
    seed: pydantic.NonNegativeInt = 0
    """episode number i is reset with this seed + i"""
    write: bool = False
    """put the means into reference.json"""


class Levels(pydantic.BaseModel):
    """reference.json."""

    scale: str
    environments: dict[str, dict[str, float | str | dict]]


@functools.cache
def load_reference() -> dict[str, dict]:
    """Environment -> its entry: `random` and `reference`, the returns of 0 and 1, and their sources. Raises
    BadSuite for a file that is damaged or not there."""
    content = read_as(Levels, REFERENCE)
    if content is None:
        raise BadSuite(f"{REFERENCE} is missing; it holds the levels that returns are normalised with")
    return content.environments


def normalise(returns: np.ndarray, zero: float, one: float) -> np.ndarray:
    """Scores of returns on that scale, at least 0."""
    return np.maximum((np.asarray(returns, dtype=np.float64) - zero) / (one - zero), 0.0)


def random_returns(environment: str, episodes: int, seed: int) -> tuple[np.ndarray, str]:
    """Undiscounted returns (episodes,) of uniform actions, and what made them, in words.

    Gymnasium steps the environment, except for Pusher-v4, which it cannot make with MuJoCo 3 or newer: that
    one is EnvPool's.
    """
    vector = environment == "Pusher-v4"
    with warnings.catch_warnings():  # that there is a newer version, and of float64 boxes that become float32
        warnings.filterwarnings("ignore", ".*is out of date.*", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*precision lowered by casting", UserWarning)
        if vector:
            import envpool

            env = envpool.make(environment, env_type="gymnasium", num_envs=1, seed=seed, num_threads=1)
            actions, made = env.action_space, f"seed {seed}, envpool {version('envpool')}"
        else:
            env = gym.make(environment)
            actions = env.action_space
            made = f"seeds {seed}-{seed + episodes - 1}, gymnasium {version('gymnasium')}"
            made += f", mujoco {version('mujoco')}" if "mujoco" in env.spec.entry_point else ""
    actions.seed(seed)
    returns = np.zeros(episodes)
    for episode in range(episodes):
        env.reset(**({} if vector else {"seed": seed + episode}))  # EnvPool's seed is given once, above
        done = False
        while not done:
            action = actions.sample()
            _, reward, terminated, truncated, _ = env.step(action[None] if vector else action)
            returns[episode] += np.sum(reward)  # of one environment
            done = bool(np.any(terminated | truncated))
    env.close()
    return returns, made


def measure(args: Args) -> None:
    """Print the random policies' mean returns, and write them if asked; published ones stay."""
    table = json.loads(REFERENCE.read_text())
    for environment, entry in table["environments"].items():
        if entry["random_source"].startswith(MEASURED):
            returns, made = random_returns(environment, args.episodes, args.seed)
            entry["random"] = round(float(returns.mean()), 2)
            words = [f"{MEASURED}: mean of {args.episodes} episodes", made]
            words[1:1] = [f"standard deviation {returns.std(ddof=1):.2f}"] if args.episodes > 1 else []
            entry["random_source"] = ", ".join(words)
            print(environment, entry["random"], flush=True)
    if args.write:
        text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
        write_atomically(REFERENCE, lambda new: new.write_text(text))


if __name__ == "__main__":
    measure(tyro.cli(Args))
