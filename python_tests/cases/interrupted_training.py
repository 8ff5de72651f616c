"""Training in a process of its own, killed in a chosen step: `-m cases.interrupted_training FOLDER ARCHITECTURE STEP`."""

import os
import signal
import sys
from pathlib import Path

import torch

from cases.dense_training import planted
from darkmatter_ext.training import train as training
from darkmatter_ext.training.config import TrainingConfig


def configs(architecture):
    """Two SAEs of one stream, one of them done before the other."""
    options = {"k": 3, "batch_size": 128, "dead_after_tokens": 300, "architecture": architecture, "learning_rate": 3e-3}
    return [TrainingConfig(d_sae=32, steps=30, **options), TrainingConfig(d_sae=48, steps=20, seed=1, **options)]


def run(folder, architecture, progress=None):
    """Train to the end, a state saved after every step."""
    checkpoint = training.Checkpoint(Path(folder), seconds=0)
    return training.train(
        planted(n=1000)[0], configs(architecture), checkpoint=checkpoint, log_every=7, progress=progress
    )


def kill_in_step(number):
    """End the process, as the system would, in the middle of its `number`-th step."""
    one_step, left = training._Run._one_step, [number]

    def step(self):
        found = one_step(self)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    training._Run._one_step = step


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_in_step(int(sys.argv[3]))
    run(*sys.argv[1:3])
