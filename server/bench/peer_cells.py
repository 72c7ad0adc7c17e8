"""The cells of the comparison with other servers: how many in flight, on which adapters."""

from __future__ import annotations

from dataclasses import dataclass

from workload import Work, make_skewed_work

#: Requests of a cell by how many are in flight: two rounds at 32.
_NUM_REQUESTS = {1: 8, 8: 32, 32: 64}


@dataclass(frozen=True)
class Cell:
    """One load; `num_adapters` 0 is the base model.

    Attributes:
        alpha: of the power law; 1 is uniform.
        zipf: exponent of Zipf's law, instead of `alpha`.
    """

    concurrency: int
    num_adapters: int
    alpha: float = 1.0
    zipf: float | None = None

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Read `CONCURRENCY:ADAPTERS[:ALPHA|:zipfEXPONENT]`.

        Raises:
            ValueError: it is written otherwise.
        """
        numbers = text.split(":")
        if not 2 <= len(numbers) <= 3:
            raise ValueError(f"a cell is CONCURRENCY:ADAPTERS[:ALPHA|:zipfEXPONENT], not {text!r}")
        concurrency, num_adapters = map(int, numbers[:2])
        law = numbers[2] if len(numbers) == 3 else "1"
        if law.startswith("zipf"):
            return cls(concurrency, num_adapters, zipf=float(law.removeprefix("zipf")))
        return cls(concurrency, num_adapters, float(law))

    @property
    def name(self) -> str:
        """Return what `parse` reads."""
        law = f":{self.alpha:g}" if self.alpha != 1 else ""
        if self.zipf is not None:
            law = f":zipf{self.zipf:g}"
        return f"{self.concurrency}:{self.num_adapters}{law}"

    def work(self, seed: int, attempt: int = 0) -> list[Work]:
        """Return the requests: lengths by the seed alone, ids by cell and attempt too.

        Servers keep the prompts they have seen, so a cell must not bring those of another one.
        """
        num_requests = _NUM_REQUESTS.get(self.concurrency, 2 * self.concurrency)
        return make_skewed_work(
            num_requests,
            self.num_adapters,
            seed,
            alpha=self.alpha,
            zipf=self.zipf,
            ids_salt=f"{self.name}/{attempt}",
        )


#: What every server is asked to do.
CELLS = tuple(map(Cell.parse, ("1:0", "8:0", "32:0", "8:32", "32:32", "32:1", "32:512:0.3")))
#: What only ours is asked to do.
OUR_CELLS = (Cell.parse("32:2000:zipf1"),)
