"""The scale of scores: 0 = a random policy or worse, 1 = a reference level, fixed for each environment and kind of algorithm.

    python -m benchmark.reference                measures the random policies again and prints them (minutes)
    python -m benchmark.reference --write        and writes them to reference.json, the scale of every normalised score

`reference.json` is the only place of these numbers. Its reference levels are published ones or constants, each with its source,
and are never taken from this repository's own runs: a scale that moved with the results would hide them.
"""

import functools
import json
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

from benchmark.machine import write_atomically

REFERENCE = Path(__file__).parent / "reference.json"


@dataclass
class Args:
    episodes: int = 100
    """episodes of the random policy on each environment, in [1, inf)"""
    seed: int = 0
    """episode number i is reset with this seed + i"""
    write: bool = False
    """put the means into reference.json"""


@functools.cache
def load_reference() -> dict[str, dict]:
    """Environment -> its entry: `random` and `reference`, the returns of 0 and 1, where they come from, and `by_script`, script ->
    its own reference, where the algorithm is of another kind."""
    return json.loads(REFERENCE.read_text())["environments"]


def normalise(returns: np.ndarray, zero: float, one: float) -> np.ndarray:
    """Scores of returns on that scale, at least 0."""
    return np.maximum((np.asarray(returns, dtype=np.float64) - zero) / (one - zero), 0.0)


def random_returns(environment: str, episodes: int, seed: int) -> tuple[np.ndarray, str]:
    """Undiscounted returns (episodes,) of actions drawn uniformly from the action space, and what made them, in words.

    Gymnasium steps the environment, except for Pusher-v4, which it cannot make with MuJoCo 3 or newer: that one is EnvPool's.
    """
    if environment == "Pusher-v4":
        import envpool

        with warnings.catch_warnings():  # of float64 boxes that become float32
            warnings.filterwarnings("ignore", ".*precision lowered by casting", UserWarning)
            env = envpool.make(environment, env_type="gymnasium", num_envs=1, seed=seed, num_threads=1)
            actions = env.action_space
        made = f"seed {seed}, envpool {version('envpool')}"
    else:
        with warnings.catch_warnings():  # that there is a newer version of the environment
            warnings.filterwarnings("ignore", ".*is out of date.*", DeprecationWarning)
            env = gym.make(environment)
        actions = env.action_space
        physics = f", mujoco {version('mujoco')}" if "mujoco" in env.spec.entry_point else ""
        made = f"seeds {seed}-{seed + episodes - 1}, gymnasium {version('gymnasium')}{physics}"
    vector = isinstance(env, gym.vector.VectorEnv)
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
    """Print the random policies' mean returns, and write them into reference.json if asked; those that were published stay."""
    table = json.loads(REFERENCE.read_text())
    for environment, entry in table["environments"].items():
        if not entry["random_source"].startswith("uniform actions, measured by"):
            continue  # a published level
        returns, made = random_returns(environment, args.episodes, args.seed)
        entry["random"] = round(float(returns.mean()), 2)
        spread = f"standard deviation {returns.std(ddof=1):.2f}, " if args.episodes > 1 else ""
        entry["random_source"] = (
            f"uniform actions, measured by `python -m benchmark.reference`: mean of {args.episodes} episodes, {spread}{made}"
        )
        print(environment, entry["random"], flush=True)
    if args.write:
        text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
        write_atomically(REFERENCE, lambda new: new.write_text(text))


if __name__ == "__main__":
    measure(tyro.cli(Args))
