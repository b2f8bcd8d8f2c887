"""Records and sizes of Flower's messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from strategies import messages
from strategies.messages import decode_all, to_record
from tests.fakes import Answer, FakeGrid


def test_records_survive_the_way_through_messages() -> None:
    tensors = {"x": torch.randn(3, 2), "h": torch.randn(4).bfloat16(), "s": torch.tensor(2.0)}
    record = to_record(tensors)
    assert isinstance(record, ArrayRecord) and list(record) == list(tensors)
    back = decode_all(record)
    assert all(torch.equal(back[k], tensors[k]) and back[k].dtype == tensors[k].dtype for k in back)


@pytest.mark.usefixtures("server")
def test_size_of_a_message_counts_everything_in_it() -> None:
    content = Answer(report={"a": "x" * 10, "b": ""}, more={"m": ConfigRecord({"k": b"y" * 5})})
    arrays = {"w": Array("float32", (2,), "florilegium.raw", bytes(8))}
    grid = FakeGrid({1: lambda q: [replace(content, arrays=arrays)]})
    question = Message(RecordDict(), 1, "query")
    (reply,) = messages.collect(grid, [question], 1.0)
    assert 8 + 10 + 5 <= messages._nbytes(reply.content) <= 8 + 10 + 5 + 20
