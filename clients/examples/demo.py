"""The main job, for eyes: one server, one base model, four adapters, sixteen requests at once.

Starts `loraplex serve` on a free port with a data folder of its own, pushes the example adapters
through the SDK, streams sixteen answers over the five models, and shows what each adapter changed.
On a terminal the server stays up until Ctrl-C, so that the printed commands can be tried.

    python clients/examples/demo.py [--port N] [--no-wait]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from loraplex import APIConnectionError, AsyncClient, Client
from loraplex.types import Pool

HERE = Path(__file__).resolve().parent
ADAPTERS = ("pirate", "json-extract", "sql", "ticket-label")
START_TIMEOUT_S = 300.0
MAX_TOKENS = 64


@dataclass
class Job:
    """One streamed request and what came of it."""

    adapter: str
    model: str
    prompt: str
    answer: str = ""
    num_tokens: int = 0
    ttft_s: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    parser.add_argument("--no-wait", action="store_true", help="stop the server at the end")
    options = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        # A log has room: keep both answers of a row readable.
        console = Console(width=132)
    with tempfile.TemporaryDirectory(prefix="loraplex-demo-") as folder:
        port = options.port or free_port()
        with serve(port, Path(folder)) as process:
            run_demo(console, f"http://127.0.0.1:{port}", process)
            if console.is_terminal and not options.no_wait:
                console.print("\nThe server keeps running. [bold]Ctrl-C[/] stops it.")
                with suppress(KeyboardInterrupt):
                    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `loraplex serve` while the block runs; its log goes to a file, shown if it fails."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "loraplex_server", "--port", str(port)]
    command += ["--data-dir", str(folder / "data")]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
            if process.returncode not in (0, -2, -15):
                sys.stderr.write(log.read_text(errors="replace")[-3000:])


def run_demo(console: Console, base_url: str, process: subprocess.Popen[bytes]) -> None:
    client = Client(base_url=base_url)
    base = wait_until_ready(console, client, process)
    push_adapters(console, client)
    jobs = [
        Job(adapter, model, example["messages"][-1]["content"])
        for adapter in ADAPTERS
        for example in heldout(adapter)[:2]
        for model in (base, adapter)
    ]
    started = time.perf_counter()
    pool = asyncio.run(stream_all(console, base_url, jobs))
    elapsed_s = time.perf_counter() - started
    console.print(answers_table(jobs))
    console.print(figures_table(jobs, elapsed_s, pool))
    console.print(Text("\nTry next", style="bold"))
    console.print(next_steps(base_url), soft_wrap=True, highlight=False)


def wait_until_ready(console: Console, client: Client, process: subprocess.Popen[bytes]) -> str:
    """Wait for the model to load; return the base model's name."""
    deadline = time.monotonic() + START_TIMEOUT_S
    with console.status("Loading SmolLM2-135M-Instruct ..."):
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise SystemExit("the server did not start; its last words follow")
            with suppress(APIConnectionError):
                if client.health().status == "ok":
                    return next(m.id for m in client.models.list() if m.parent is None)
            time.sleep(0.2)
    raise SystemExit(f"the server was not ready within {START_TIMEOUT_S:.0f} s")


def push_adapters(console: Console, client: Client) -> None:
    columns = (TextColumn("{task.description:>28}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console) as progress:
        for name in ADAPTERS:
            task = progress.add_task(f"push {name}", total=None)

            def show(sent: int, total: int, task: int = task) -> None:
                progress.update(task, completed=sent, total=total)  # type: ignore[arg-type]

            record = client.adapters.push(HERE / name, name=name, on_progress=show)
            modules = ",".join(record.target_modules)
            progress.update(task, description=f"{name}: rank {record.rank_max} on {modules}")


def heldout(adapter: str) -> list[dict[str, list[dict[str, str]]]]:
    lines = (HERE / adapter / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


async def stream_all(console: Console, base_url: str, jobs: list[Job]) -> Pool:
    """Stream all jobs at once; return the pool as it was when most of it held KV."""
    text = TextColumn("{task.description}")
    async with AsyncClient(base_url=base_url) as client:
        with Progress(SpinnerColumn(), text, console=console, transient=True) as progress:
            progress.add_task(f"streaming {len(jobs)} answers over {len(ADAPTERS) + 1} models")
            seen: list[Pool] = []
            watcher = asyncio.create_task(watch_pool(client, seen))
            await asyncio.gather(*(stream_one(client, job) for job in jobs))
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
        return max(seen, key=lambda pool: pool.kv) if seen else await client.pool()


async def watch_pool(client: AsyncClient, seen: list[Pool]) -> None:
    while True:
        seen.append(await client.pool())
        await asyncio.sleep(0.2)


async def stream_one(client: AsyncClient, job: Job) -> None:
    started = time.perf_counter()
    stream = await client.chat.create(
        model=job.model,
        messages=[{"role": "user", "content": job.prompt}],
        stream=True,
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream_options={"include_usage": True},
    )
    async with stream:
        async for piece in stream.text:
            job.ttft_s = job.ttft_s or time.perf_counter() - started
            job.answer += piece
        job.num_tokens = stream.usage.completion_tokens if stream.usage else 0


def answers_table(jobs: list[Job]) -> Table:
    """Lay out each prompt with the base's and the adapter's answer side by side."""
    table = Table(title="Same prompt, same batch: base and adapter", show_lines=True)
    table.add_column("adapter", style="bold")
    table.add_column("prompt", ratio=3)
    table.add_column("base answers", ratio=4, style="dim")
    table.add_column("adapter answers", ratio=4, style="green")
    for base, tuned in zip(jobs[::2], jobs[1::2], strict=True):
        cells = (tuned.prompt, base.answer, tuned.answer)
        table.add_row(tuned.adapter, *(Text(shorten(cell.strip())) for cell in cells))
    return table


def shorten(text: str, most: int = 300) -> str:
    return text if len(text) <= most else text[: most - 4] + " ..."


def figures_table(jobs: list[Job], elapsed_s: float, pool: Pool) -> Table:
    num_tokens = sum(job.num_tokens for job in jobs)
    ttfts = sorted(job.ttft_s for job in jobs)
    mib = pool.page_bytes / 2**20
    table = Table(title="One engine, one pool", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows = {
        "requests at once": str(len(jobs)),
        "output tokens": f"{num_tokens} in {elapsed_s:.1f} s",
        "output tokens per second": f"{num_tokens / elapsed_s:.0f}",
        "time to first token, median": f"{1000 * ttfts[len(ttfts) // 2]:.0f} ms",
        "pool": f"{pool.num_pages} pages of {mib:.2f} MiB",
        "  held by KV cache (peak seen)": f"{pool.kv} pages, {pool.kv * mib:.0f} MiB",
        "  held by adapters": f"{pool.adapters} pages, {pool.adapters * mib:.0f} MiB",
        "  free": f"{pool.free} pages",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def next_steps(base_url: str) -> str:
    # Spelled so that they work as they are, in a shell that has activated nothing.
    folder = Path(sys.executable).parent
    with suppress(ValueError):
        folder = folder.relative_to(Path.cwd())
    return f"""
  curl {base_url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "pirate", "messages": [{{"role": "user", "content": "How do I boil an egg?"}}]}}'

  {folder}/python -c "from openai import OpenAI
  client = OpenAI(base_url='{base_url}/v1', api_key='none')
  print(client.completions.create(model='pirate', prompt='The sea', max_tokens=20).choices[0].text)"

  {folder}/loraplex --base-url {base_url} chat --model pirate
  {folder}/loraplex --base-url {base_url} adapters list
  {folder}/loraplex serve --help"""


if __name__ == "__main__":
    main()
