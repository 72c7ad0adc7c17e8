from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from loraplex_server.ray_serve.data_folder import ClaimedFolder


def test_each_replica_gets_a_folder_and_the_next_one_what_was_left(tmp_path):
    first, second = (ClaimedFolder.first_free(tmp_path / "data") for _ in range(2))
    assert (first.path, second.path) == (tmp_path / "data/replica-0", tmp_path / "data/replica-1")
    first.close()
    third = ClaimedFolder.first_free(tmp_path / "data")
    assert third.path == tmp_path / "data/replica-0"
    second.close()
    third.close()


def test_the_only_folder_goes_to_the_next_replica_once_its_owner_has_ended(tmp_path):
    first = ClaimedFolder.the_only_one(tmp_path / "data")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(ClaimedFolder.the_only_one, tmp_path / "data")
        time.sleep(0.1)
        assert not waiting.done()
        first.close()
        second = waiting.result(timeout=30)
    assert second.path == tmp_path / "data"
    second.close()
