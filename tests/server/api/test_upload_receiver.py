from __future__ import annotations

import pytest

from loraplex_server.adapters.errors import InvalidUpload, UploadTooLarge
from loraplex_server.adapters.upload import UploadStaging
from loraplex_server.api.upload import UploadReceiver

BODY = b'--b\r\ncontent-disposition: form-data; name="name"\r\n\r\nx\r\n--b--'


@pytest.fixture
def receiver(tmp_path):
    with UploadStaging(tmp_path) as staging:
        yield UploadReceiver(b"b", staging, lambda name: None, max_body_bytes=200)


def test_line_breaks_may_follow_the_closing_boundary(receiver):
    receiver.feed(BODY)
    receiver.feed(b"\r\n")
    assert receiver.finish().name == "x"


def test_nothing_else_may_follow_the_closing_boundary(receiver):
    receiver.feed(BODY + b"\r\n")
    with pytest.raises(InvalidUpload, match="closing boundary"):
        receiver.feed(b"x")


def test_a_body_is_bounded_also_where_it_holds_no_file(receiver):
    receiver.feed(BODY)
    with pytest.raises(UploadTooLarge):
        receiver.feed(b"\r\n" * 100)


def test_the_headers_of_a_part_are_bounded_together(tmp_path):
    line = b"x-%d: " + b"y" * 3000 + b"\r\n"
    with UploadStaging(tmp_path) as staging:
        receiver = UploadReceiver(b"b", staging, lambda name: None, max_body_bytes=1 << 20)
        with pytest.raises(InvalidUpload, match="headers of a part"):
            receiver.feed(b"--b\r\n" + b"".join(line % i for i in range(4)))
