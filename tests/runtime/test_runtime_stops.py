"""Stop texts, however the answer is cut into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slmops.runtime.stops import StopScanner

texts = st.text(alphabet="ab", max_size=12)


@given(st.lists(texts, max_size=8), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_what_comes_out_is_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    out = "".join(scanner.push(piece) for piece in pieces)
    stopped = scanner.stopped
    out += scanner.flush()
    whole = "".join(pieces)
    found = [whole.index(stop) for stop in stops if stop in whole]
    assert stopped == bool(found)
    if found:
        # A stop that is complete ends the answer at once, even where a longer one began before it.
        assert whole.startswith(out)
        assert len(out) >= min(found)
        assert not any(stop in out for stop in stops)
    else:
        assert out == whole


def test_text_is_held_back_only_while_it_could_become_a_stop() -> None:
    scanner = StopScanner(["STOP", ""])
    assert scanner.push("go ST") == "go "
    assert scanner.push("ART S") == "START "
    assert scanner.push("TOP now") == ""
    assert scanner.stopped
    assert scanner.push("more") == scanner.flush() == ""


def test_the_first_of_two_stops_wins() -> None:
    scanner = StopScanner(["world", "lo"])
    assert scanner.push("hello world") == "hel"
