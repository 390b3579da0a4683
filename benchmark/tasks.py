"""Tasks that suites name as benchmark.tasks:NAME; importing the module registers them in Gymnasium."""

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv


def signed_cartpole(**arguments) -> gym.Env:
    """CartPole for a policy over numbers: the one action (1,) in [-1, 1] pushes the cart to the right where it
    is above 0, else to the left, with CartPole's one force; `arguments` are CartPole's."""
    box = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    return gym.wrappers.TransformAction(CartPoleEnv(**arguments), lambda action: int(action[0] > 0), box)


gym.register("SignedCartPole-v1", "benchmark.tasks:signed_cartpole", max_episode_steps=500)
