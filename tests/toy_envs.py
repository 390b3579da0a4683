"""Small tasks for the tests, registered on import. `Walk` keeps a record of what really happened in it."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Sequence

EPISODES = []  # (instance, return, length, "terminated" or "truncated") of every episode of Walk that ended
STEPS = []  # (instance, observation the action answers, action) of every step of Walk


class Walk(gym.Env):
    """Episodes of 2 to 11 steps that end either way. The observations have three scales; in the action box 0, the mean
    action of a fresh policy, is too low for the first number, so a policy that is not clipped to it shows."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    action_space = Box(np.array([0.1, -1.0], np.float32), np.array([0.4, 2.0], np.float32))
    instances = 0

    def __init__(self):
        self.instance = Walk.instances
        Walk.instances += 1

    def observation(self):
        x, y = self.position
        return np.array([1000 * x + 500, y, 0.001 * (x + y) - 3], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=2)
        self.rewards, self.length = [], int(self.np_random.integers(2, 12))
        self.last = self.observation()
        return self.last, {}

    def step(self, action):
        STEPS.append((self.instance, self.last.copy(), np.array(action)))
        self.position = 0.9 * self.position + self.push(action) + 0.1 * self.np_random.normal(size=2)
        self.rewards.append(float(self.position[0] - 0.1 * self.position[1] ** 2))
        ended = len(self.rewards) == self.length
        terminated = ended and bool(self.np_random.random() < 0.5)
        if ended:
            how = "terminated" if terminated else "truncated"
            EPISODES.append((self.instance, sum(self.rewards), self.length, how))
        self.last = self.observation()
        return self.last, self.rewards[-1], terminated, ended and not terminated, {}

    def push(self, action):
        return action


class DiscreteWalk(Walk):
    """The same with three actions, of which the first is number 2: a policy that counts from 0 shows."""

    action_space = Discrete(3, start=2)

    def push(self, action):
        return np.array([[0.1, -1.0], [0.25, 0.5], [0.4, 2.0]])[action - 2]


class Clock(gym.Env):
    """No randomness, and an episode with the reset after it takes 32 steps: after any 32 steps it is as it was."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.position = 0, 1.0
        return np.array([self.time, self.position], dtype=np.float32), {}

    def step(self, action):
        self.time += 1
        self.position = 0.9 * self.position + self.push(action)
        observation = np.array([self.time, self.position], dtype=np.float32)
        return observation, -(self.position**2), False, self.time == 31, {}

    def push(self, action):
        return float(action[0])


class DiscreteClock(Clock):
    """The same with the actions -1, 0 and 1."""

    action_space = Discrete(3, start=-1)

    def push(self, action):
        return float(action)


class Spaces(gym.Env):
    """Episodes of 5 random observations, with any spaces."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space, self.steps = observation_space, action_space, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 5, False, {}


class Unavailable(gym.Env):
    """A task that is registered but whose package is missing."""

    def __init__(self):
        raise ImportError("needs the package maps. Install it with pip")


class Broken(Clock):
    """A task that raises an error in its hundredth step."""

    steps = 0

    def step(self, action):
        Broken.steps += 1
        if Broken.steps == 100:
            raise RuntimeError("the hundredth step breaks")
        return super().step(action)


BOX = Box(-1, 1, (2,), np.float32)
OBSERVATIONS = {
    "DictObs": Dict({"image": Box(0, 255, (2, 2), np.uint8), "goal": Discrete(3)}),
    "DiscreteObs": Discrete(4),
    "SequenceObs": Sequence(Discrete(4)),
}
SPACES = {f"toy/{name}-v0": (observations, BOX) for name, observations in OBSERVATIONS.items()}
SPACES |= {f"toy/{name}Discrete-v0": (observations, Discrete(3)) for name, observations in OBSERVATIONS.items()}
SPACES |= {
    "toy/DiscreteActions-v0": (BOX, Discrete(3)),
    "toy/MultiDiscreteActions-v0": (BOX, MultiDiscrete([2, 3])),
    "toy/MatrixActions-v0": (BOX, Box(-1, 1, (2, 2), np.float32)),
}

for actions, walk, clock in (("", Walk, Clock), ("Discrete", DiscreteWalk, DiscreteClock)):
    gym.register(f"Walk{actions}-v0", entry_point=walk)
    gym.register(f"toy/Walk{actions}-v0", entry_point=walk)
    gym.register(f"toy/Clock{actions}-v0", entry_point=clock)
gym.register("toy/Unavailable-v0", entry_point=Unavailable)
gym.register("toy/Broken-v0", entry_point=Broken)
for name, (observations, actions) in SPACES.items():
    gym.register(name, entry_point=Spaces, kwargs={"observation_space": observations, "action_space": actions})
