"""Who does what in csrc/sm90_attention.cu, as csrc/include/attention_schedule.h says it and g++ compiles it."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

BLOCK = ROWS = 64


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("attention") / "schedule.so"
    source = Path(__file__).with_name("attention_schedule.cpp")
    command = ["g++", "-std=c++17", "-O0", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.walk.restype = ctypes.c_char_p
    return loaded


@pytest.mark.parametrize("every", range(8))
def test_every_block_is_taken_once_in_order_and_both_warpgroups_take_as_many_turns(compiled, every):
    for own in range(every + 1):
        head, *said = compiled.walk(own, every).decode().splitlines()
        assert head == f"{2 * every} {every + 1}", "a warpgroup must let all copies pass, and take a turn for each block and one more"
        done = [line for line in said if line not in ("begin", "end") and not line.startswith("skip")]
        expected = ["scores 0 K0", "settle 0"] if own else []
        for block in range(own):
            more = block + 1 < own
            expected += [f"scores {block + 1} K{block + 1}"] * more + [f"accumulate {block} V{block}"]
            expected += [f"settle {block + 1}"] * more + [f"proceed {block + 1}" if more else "complete"]
        assert done == expected
        inside = 0
        for line in said:  # the tensor cores get work inside turns alone, and nothing waits there
            inside += {"begin": 1, "end": -1}.get(line, 0)
            if line not in ("begin", "end"):
                assert inside == (line.split()[0] in ("scores", "accumulate")), said


def events(compiled, own: int, every: int):
    """What a warpgroup waits for and gives away, in order: turns, and copies by their position."""
    order = {}
    for position in range(2 * every):  # K0 K1 V0 K2 V1 ... V(n-1)
        block = 0 if position == 0 else (position + 1) // 2 if position % 2 else position // 2 - 1
        values = position > 0 and (position % 2 == 0 or position == 2 * every - 1)
        order[f"V{every - 1}" if position == 2 * every - 1 else f"{'V' if values else 'K'}{block}"] = position
    held = {}
    for line in compiled.walk(own, every).decode().splitlines()[1:]:
        what, *rest = line.split()
        if what in ("begin", "end"):
            yield what, 0
        elif what == "skip":
            yield from (("take", order[rest[0]]), ("free", order[rest[0]]))
        elif what in ("scores", "accumulate"):
            held[what] = order[rest[1]]
            yield "take", held[what]
        else:
            yield "free", held["scores" if what == "settle" else "accumulate"]


@pytest.mark.parametrize("slots", [4, 5, 11])
def test_nobody_waits_for_somebody_who_waits(compiled, slots):
    """Both warpgroups, the producer and so many slots, each as far as it comes: all must come to the end, in whatever proportion."""
    for every in range(1, 30):
        for own in {0, 1, every // 2, every - 1, every}:
            for pair in ((own, every), (every, own)):
                todo = [list(events(compiled, mine, every)) for mine in pair]
                freed, turns, moved = [0, 0], [1, 0], True  # turns that each may take: the first is warpgroup 0's
                while moved:
                    moved = False
                    for group in (0, 1):
                        while todo[group]:
                            what, position = todo[group][0]
                            if (what == "begin" and not turns[group]) or (what == "take" and position >= slots + min(freed)):
                                break
                            turns[group] -= what == "begin"
                            turns[1 - group] += what == "end"
                            freed[group] += what == "free"
                            todo[group].pop(0)
                            moved = True
                assert todo == [[], []], f"{pair} of {every} blocks with {slots} slots stop at {[t[:1] for t in todo]}"


@pytest.mark.parametrize("causal", [False, True])
def test_reach_is_what_rows_see(compiled, causal):
    got = (ctypes.c_int * 2)()
    sizes = (0, 1, 63, 64, 65, 128, 200, 300)
    for queries in sizes:
        for keys in sizes:
            for row in range(0, 320, ROWS):
                compiled.find_reach(row, queries, keys, int(causal), got)
                rows = range(row, min(row + ROWS, queries))
                seen = [max(0, min(keys, i + keys - queries + 1)) if causal else keys for i in rows]
                blocks = -(-max(seen, default=0) // BLOCK)
                assert got[0] == blocks, (row, queries, keys)
                assert got[1] <= min(seen, default=0) // BLOCK  # a block that needs a mask is never taken for whole ...
                if blocks and len(rows) == ROWS:
                    assert got[1] == min(seen) // BLOCK  # ... and none is masked for nothing


@pytest.mark.parametrize("heads, sequences, tiles, section", [(1, 1, 1, 1), (32, 1, 8, 32), (32, 1, 8, 12), (6, 3, 5, 4), (4, 2, 3, 8)])
def test_every_tile_is_taken_once_the_longest_of_a_section_first(compiled, heads, sequences, tiles, section):
    got, found = (ctypes.c_int * 3)(), []
    for item in range(heads * sequences * tiles):
        compiled.find_tile(heads, sequences, tiles, section, item, got)
        found.append(tuple(got))
    assert len(set(found)) == len(found)
    assert set(found) == {(t, h, s) for t in range(tiles) for h in range(heads) for s in range(sequences)}
    for first in range(0, heads * sequences, section):
        part = found[first * tiles : (first + section) * tiles]
        assert {s * heads + h for _, h, s in part} == set(range(first, min(first + section, heads * sequences)))
        assert [t for t, _, _ in part] == sorted((t for t, _, _ in part), reverse=True)
