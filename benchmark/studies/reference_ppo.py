"""PPO in the manner of CleanRL's scripts, the loop that most readers know, to compare the speed with."""

import time

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor


def reference_loop(args, envs, first_obs, action_shape, policy_and_value, parameters, rollout_done) -> None:
    """Train for ever with a script's arguments on a vector of environments; no logging.

    Values are asked at every step, GAE is a loop over time, distributions are those of torch, Adam is its
    default implementation, and a number is read back in every minibatch.
    """
    optimiser, device = torch.optim.Adam(parameters, args.learning_rate, eps=1e-5), torch.device(args.device)
    shape, batch_size = (args.num_steps, args.num_envs), args.num_steps * args.num_envs
    next_obs, next_done = torch.Tensor(first_obs).to(device), torch.zeros(args.num_envs, device=device)
    obs = torch.zeros(args.num_steps, *next_obs.shape, device=device)
    actions = torch.zeros(*shape, *action_shape, device=device)
    logprobs, rewards, dones, values = (torch.zeros(shape, device=device) for _ in range(4))

    def of_row(x: Tensor) -> Tensor:
        return x.sum(1) if action_shape else x

    while True:
        rollout_start, env_time = time.perf_counter(), 0.0
        for t in range(args.num_steps):
            obs[t], dones[t] = next_obs, next_done
            with torch.no_grad():
                policy, values[t] = policy_and_value(next_obs)
                actions[t] = action = policy.sample()
                of_row(policy.entropy())
                logprobs[t] = of_row(policy.log_prob(action))
            env_start = time.perf_counter()
            seen, reward, terminated, truncated, _ = envs.step(action.cpu().numpy())
            env_time += time.perf_counter() - env_start
            rewards[t] = torch.tensor(reward).to(device).view(-1)
            next_obs, next_done = (
                torch.Tensor(x).to(device) for x in (seen, np.logical_or(terminated, truncated))
            )
        update_start = time.perf_counter()
        with torch.no_grad():
            next_value, last = policy_and_value(next_obs)[1], 0.0
            advantages = torch.zeros_like(rewards)
            for t in reversed(range(args.num_steps)):
                going = 1.0 - (next_done if t == args.num_steps - 1 else dones[t + 1])
                following = next_value if t == args.num_steps - 1 else values[t + 1]
                delta = rewards[t] + args.gamma * following * going - values[t]
                advantages[t] = last = delta + args.gamma * args.gae_lambda * going * last
            returns = advantages + values
        flat = [
            x.reshape(batch_size, *x.shape[2:]) for x in (obs, actions, logprobs, advantages, returns, values)
        ]
        order, clip_fractions = np.arange(batch_size), []
        for _ in range(args.update_epochs):
            np.random.shuffle(order)
            for batch in np.split(order, args.num_minibatches):
                b_obs, b_actions, b_logprobs, b_advantages, b_returns, b_values = (x[batch] for x in flat)
                policy, new_values = policy_and_value(b_obs)
                entropy = of_row(policy.entropy())
                logratio = of_row(policy.log_prob(b_actions)) - b_logprobs
                ratio = logratio.exp()
                with torch.no_grad():
                    (-logratio).mean()
                    ((ratio - 1) - logratio).mean()
                    clip_fractions.append(((ratio - 1.0).abs() > args.clip_coef).float().mean().item())
                b_advantages = (b_advantages - b_advantages.mean()) / (b_advantages.std() + 1e-8)
                clipped_ratio = torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
                policy_loss = torch.max(-b_advantages * ratio, -b_advantages * clipped_ratio).mean()
                change = torch.clamp(new_values - b_values, -args.clip_coef, args.clip_coef)
                errors = torch.max((new_values - b_returns) ** 2, (b_values + change - b_returns) ** 2)
                loss = policy_loss - args.ent_coef * entropy.mean() + args.vf_coef * 0.5 * errors.mean()
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimiser.step()
        update_time = time.perf_counter() - update_start
        seconds = {"env": env_time, "policy": update_start - rollout_start - env_time, "update": update_time}
        rollout_done(seconds | {"steps": batch_size})
