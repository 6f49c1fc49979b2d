"""One round after another, until enough was asked.

Rule: the main thread. It opens rounds, waits, closes bridges and looks at what is left; it asks nothing itself.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from random import Random

from lmbridge.testing.storm.crew import Crew
from lmbridge.testing.storm.judge import FAULTS, Books
from lmbridge.testing.storm.plan import Plan, plans
from lmbridge.testing.storm.round import Round
from lmbridge.testing.storm.saboteurs import Saboteur
from lmbridge.testing.storm.watch import GRACE, PATIENCE, Post, Watch

NEWS = 5.0  # seconds between two lines of progress
SLICE = 0.5  # seconds between two looks of the main thread
CLOSE_PATIENCE = 25.0  # seconds beyond its timeout that a close may take: engines that do not close, a stuck thread


class Storm:
    """A storm of so many requests.

    Args:
        requests: how many calls, one for each prompt; a few more are made.
        seed: from which everything is drawn.
        threads, loops: how many threads ask, and how many event loops in threads of their own.
        say: takes a line of what goes on; any thread calls it.
    """

    def __init__(self, requests: int, seed: int, threads: int, loops: int, say: Callable[[str], None]) -> None:
        self.books = Books(say)
        self._requests = requests
        self._seed = seed
        self._say = say
        self._watch = Watch(lambda post, what: self._crew.lose(post.thread, f"{post.name} waits in {what}"))
        self._crew = Crew(seed, threads, loops, self.books, self._watch, self._goes_on)
        self._began = time.monotonic()
        self._rounds = 0  # main thread only, as is the next
        self._next_news = 0.0

    def run(self) -> int:
        """Make the storm; the exit status: 0 when it has found nothing, 130 when it was interrupted, else 1."""
        switch, status = sys.getswitchinterval(), 0
        self._watch.start()
        self._crew.start()
        try:
            for plan in plans(self._seed):
                if not self._goes_on() or self._crew.gone:
                    break
                self._one_round(plan)
        except KeyboardInterrupt:
            status = 130
        finally:
            sys.setswitchinterval(switch)
        self._crew.end()
        self._watch.end()
        self._say(f"met: {_listed(self.books.met)}\nends: {_listed(self.books.ends)}\n{self._news()}")
        self._say(self._verdict())
        return status or int(any(self.books.faults.values()))

    def _goes_on(self) -> bool:
        """Whether there is anything left to ask. Any thread."""
        return self.books.requests < self._requests

    # --- one round ---

    def _one_round(self, plan: Plan) -> None:
        round, chance = Round(self._rounds, self._seed, plan, self.books), Random(f"{self._seed}/{self._rounds}")
        saboteurs = [
            Saboteur(round, self._watch, Random(chance.random()), acts, name)
            for name, acts in (("breaker", plan.breaker), ("swapper", plan.swapper))
        ]
        self._rounds += 1
        sys.setswitchinterval(plan.switch)
        try:
            self._crew.enter(round.judge)
            for saboteur in saboteurs:
                saboteur.start()
            self._wait(round)
            if plan.ending == "quiet":
                self._leave(round, saboteurs)
                round.look_at_quiet()
            self._close(round, chance)
            self._leave(round, saboteurs)
        except KeyboardInterrupt:
            round.scene.stop_asking()
            round.close(drain=False, timeout=0.0)
            raise
        round.look_at_end(calls_hang=self._crew.hangs)

    def _wait(self, round: Round) -> None:
        end = time.monotonic() + round.plan.limit
        while (left := end - time.monotonic()) > 0:
            if time.monotonic() >= self._next_news:
                self._next_news = time.monotonic() + NEWS
                self._say(self._news())
            if round.scene.wait_for(round.plan.requests, min(left, SLICE), lambda: not self._goes_on()):
                return

    def _leave(self, round: Round, saboteurs: list[Saboteur]) -> None:
        """Have everybody stop asking, and wait until they have."""
        round.scene.stop_asking()
        self._crew.wait_until_left()
        for saboteur in saboteurs:
            saboteur.join(GRACE + PATIENCE)

    def _close(self, round: Round, chance: Random) -> None:
        drain, timeout = round.plan.ending == "drain", chance.choice((0.5, 5.0))
        closers = chance.randint(2, 4) if round.plan.ending == "crowd" else 1

        def close() -> None:
            post = self._watch.add(Post(self._watch, "who closes"))
            with post.waits("close()", time.monotonic() + timeout + CLOSE_PATIENCE):
                round.close(drain, timeout)
            post.leave()

        threads = [threading.Thread(target=close, name="storm closer", daemon=True) for _ in range(closers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout + CLOSE_PATIENCE + 2 * GRACE)

    # --- what is told ---

    def _news(self) -> str:
        requests, pace, _ = self._pace()
        late = f"latest {self._watch.latest:.2f} s after its time {self._watch.latest_what}".rstrip()
        return f"{requests:,} requests of {self._rounds} bridges, {pace:,.0f} a second; {late}"

    def _verdict(self) -> str:
        requests, pace, seconds = self._pace()
        found = "  ".join(f"{kind} {self.books.faults[kind]}" for kind in FAULTS)
        return f"requests {requests}  {found}  (seed {self._seed}, {seconds:.1f} s, {pace:.0f} calls/s)"

    def _pace(self) -> tuple[int, float, float]:
        requests, seconds = self.books.requests, max(0.001, time.monotonic() - self._began)
        return requests, requests / seconds, seconds


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
