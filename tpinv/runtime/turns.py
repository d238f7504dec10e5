"""Whose turn it is: the order of launches that wait for other ranks, when they come from several streams of a device."""

import torch


class Turns:
    """Puts the launches of several streams of a device in the order of their calls, whatever their groups: two collectives that
    wait for peers must not each hold half of the ranks."""

    def __init__(self):
        self._last: dict[bool, torch.cuda.Stream] = {}  # of the calls that were captured, and of those that ran

    def next(self, stream: torch.cuda.Stream) -> int:
        """The address of ``stream``, on which the next launch may go."""
        capturing = torch.cuda.is_current_stream_capturing()
        last = self._last.get(capturing)
        if last is not None and last != stream:
            # An event recorded inside a capture means nothing outside of it, and the other way round.
            with torch.cuda.stream(last):
                alike = torch.cuda.is_current_stream_capturing() == capturing
            if alike:
                stream.wait_event(last.record_event())
        self._last[capturing] = stream
        return stream.cuda_stream
