"""Recording several policies on the same episodes, for a video side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sqap import environments
from sqap.policy import Policy
from sqap.report.clips import Clip, record_episode


def label(policy: Policy) -> str:
    """What a policy is, in a few words: ``W4A8, 154 of 256 tokens``."""
    quantization, pruning = policy.recipe.quantization, policy.recipe.pruning
    words = []
    if quantization is not None and quantization.decoder is not None:
        words.append(f"W{quantization.decoder.weight_bits}A{quantization.decoder.activation_bits}")
    if pruning is not None:
        tokens = policy.config.model.visual_tokens
        words.append(f"{pruning.budget(tokens)} of {tokens} tokens")
    return ", ".join(words) or "original"


def record_comparison(
    policies: Sequence[Policy],
    env: str,
    tasks: Sequence[str],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Clip]]:
    """One column of clips a policy, one clip a task, all with the same seed and diffusion noise.

    Raises:
        InputError: the environment or a task is unknown, or the simulator is not installed.
    """
    environments.check_tasks(env, tasks)
    columns: list[list[Clip]] = [[] for _ in policies]
    for done, task in enumerate(tasks, 1):
        world = environments.make(env, task)
        for column, policy in zip(columns, policies, strict=True):
            pruning = policy.recipe.pruning
            ring = pruning.ring if pruning is not None and pruning.method == "sqap" else None
            clip = record_episode(
                policy,
                world,
                seed,
                label=label(policy),
                ring=ring,
                units=environments.action_units(env),
                camera=policy.config.cameras[0],
                steps=policy.config.images[0],
            )
            column.append(clip)
        world.close()
        if progress is not None:
            progress(done, len(tasks))
    return columns
