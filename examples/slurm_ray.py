"""Runs on the nodes of Slurm jobs, one for each seed: the envs of a run are on all nodes of its job.

    pip install submitit
    python examples/slurm_ray.py --nodes 4 --cpus 32 --seeds 0 1 2

It is started again for runs that were stopped: they go on from their folders. ``--local`` makes the
jobs processes of this machine.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import time
from pathlib import Path

import submitit

PORT = 6379


def train(seed: int, folder: str, recipe: str, settings: dict) -> None:
    """One task of a job, on each of its nodes: the first one learns, the others have workers."""
    job = submitit.JobEnvironment()
    address = f"{socket.gethostbyname(job.hostnames[0])}:{PORT}"
    # Set before Ray is imported: workers of normal priority, and a token of the job's own.
    os.environ["RAY_worker_niceness"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(Path(folder, f"token-{seed}").resolve())
    if job.global_rank:
        # Ends when the head does.
        subprocess.run(["ray", "start", f"--address={address}", "--block"])
        return

    import ray
    from torchrl_wm.trainers import resume_run, start_run

    subprocess.run(["ray", "start", "--head", f"--port={PORT}"], check=True)
    try:
        ray.init(address, log_to_driver=False)
        while len(ray.nodes()) < job.num_tasks:  # which join one after the other
            time.sleep(1)
        run = Path(folder, f"{recipe}-{seed}")
        if run.exists():
            trainer = resume_run(run)
        else:
            trainer = start_run(recipe, run, seed=seed, collector="ray", **settings)
        trainer.train()
    finally:
        subprocess.run(["ray", "stop"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=2, help="those of a node")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", default="runs/slurm")
    parser.add_argument("--local", action="store_true")
    args = parser.parse_args()
    executor = submitit.AutoExecutor(
        Path(args.folder, "logs"), cluster="local" if args.local else "slurm"
    )
    executor.update_parameters(
        nodes=args.nodes, tasks_per_node=1, cpus_per_task=args.cpus, timeout_min=600
    )
    settings = {"env": "Pendulum-v1", "num_envs": args.nodes * args.cpus}
    jobs = []
    for seed in args.seeds:
        # All nodes of a job read it.
        token = Path(args.folder, f"token-{seed}")
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text(os.urandom(32).hex())
        token.chmod(0o600)
        jobs.append(executor.submit(train, seed, args.folder, "pets", settings))
    for job in jobs:
        job.result()


if __name__ == "__main__":
    main()
