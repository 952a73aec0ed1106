"""The event store: memory-mapped pulses at 6 bytes each, random events at hundreds of thousands a second.

Layout: `iceaggr.data.packing` (bits of a pulse) and `iceaggr.data.storefiles` (files, manifest, checksums).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from iceaggr.data.kaggle import KaggleFolder, slice_events
from iceaggr.data.packing import PackedPulses, pack
from iceaggr.data.pulses import Pulses
from iceaggr.data.schema import EventIdError, find_repeat, ranges
from iceaggr.data.storefiles import (
    ARRAYS,
    TRUTH_ARRAYS,
    CacheError,
    Extent,
    Manifest,
    append_shard,
    array_file,
    checksum,
    fingerprint,
    locked,
    open_arrays,
)
from iceaggr.directions import angles_to_vector

_CHUNK = 1 << 16  # pulses gathered at a time


class EventCache:
    """An opened store; `open_cache` and `EventCache.in_memory` make it.

    Per-event arrays, in the order of the source: event_id int64, n_doms (hit DOMs) uint16, azimuth and zenith
    float64 (None for unlabelled sources), truth (those of `storefiles.TRUTH_ARRAYS` that simulated events have, else
    None).
    """

    def __init__(self, arrays: dict[str, np.ndarray], path: Path | None = None) -> None:
        self.arrays, self.path = arrays, path
        self.event_id, self.n_doms = arrays["event_id"], arrays["n_doms"]
        self.azimuth, self.zenith = arrays.get("azimuth"), arrays.get("zenith")
        self.truth = {name: arrays[name] for name in TRUTH_ARRAYS if name in arrays} or None
        # One type for the whole store, so that types do not depend on the batch.
        times = arrays["escape_time"]
        self.wide_times = bool(times.size) and not -(2**31) <= int(times.min()) <= int(times.max()) < 2**31
        self._resident: tuple[Tensor, Tensor] | None = None
        self._copies: dict[torch.device, EventCache] = {}

    @classmethod
    def in_memory(cls, pulses: Pulses) -> Self:
        """A store of the given events without files."""
        return cls(pack(pulses.to("cpu")))

    @property
    def n_events(self) -> int:
        return len(self.event_id)

    @property
    def n_pulses(self) -> int:
        return len(self.arrays["word"])

    @property
    def n_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def device(self) -> torch.device:
        """Where gathered events come out."""
        return torch.device("cpu") if self._resident is None else self._resident[0].device

    @cached_property
    def n_pulses_E(self) -> np.ndarray:
        """Pulses per event, int64."""
        return np.diff(self.arrays["end"], prepend=0)

    @cached_property
    def direction_E3(self) -> np.ndarray:
        """(E, 3) float64 unit vectors to where the neutrinos came from. Raises CacheError without labels."""
        if self.azimuth is None or self.zenith is None:
            raise CacheError(f"the events of {self.path or 'this store'} have no azimuth and zenith")
        return angles_to_vector(self.azimuth, self.zenith)

    def gather(self, indices: np.ndarray | Sequence[int]) -> Pulses:
        """The events at these positions, in this order, on `device`."""
        return self.gather_packed(indices).unpack()

    def gather_packed(self, indices: np.ndarray | Sequence[int], *, pin: bool = False) -> PackedPulses:
        """The same as they are stored; `.to(device).unpack()` decodes them there. pin: page-locked memory.

        Raises:
            IndexError: a position outside 0..n_events - 1.
        """
        index_E = np.asarray(indices, dtype=np.int64)
        if index_E.size and not 0 <= int(index_E.min()) <= int(index_E.max()) < self.n_events:
            raise IndexError(f"event positions must be in 0..{self.n_events - 1}")
        start_E, counts_E = self._start_and_count(index_E)
        offsets_E1 = np.concatenate([[0], counts_E.cumsum()])
        # On which row of the escape table each event begins, and how many are its own.
        first_E = np.searchsorted(self.arrays["escape_index"], start_E)
        own_E = np.searchsorted(self.arrays["escape_index"], start_E + counts_E) - first_E
        row_X = ranges(first_E, own_E)
        shift_E = start_E - offsets_E1[:-1]
        small: dict[str, Any] = {
            "escape_X": self.arrays["escape_index"][row_X] - np.repeat(shift_E, own_E),
            "escape_time_X": self.arrays["escape_time"][row_X],
            "escape_charge_X": self.arrays["escape_charge"][row_X],
            "offsets_E1": offsets_E1,
            "event_id_E": self.event_id[index_E],
            "azimuth_E": None if self.azimuth is None else self.azimuth[index_E],
            "zenith_E": None if self.zenith is None else self.zenith[index_E],
        }
        if self._resident is None:
            word_P, charge_P = self._gather_on_cpu(start_E, counts_E, pin=pin)
        else:
            word_P, charge_P = self._gather_resident(shift_E, counts_E)
        pin = pin or self.device.type == "cuda"
        small = {name: x if x is None else _to(x, self.device, pin=pin) for name, x in small.items()}
        return PackedPulses(word_P, charge_P, **small, wide_times=self.wide_times)

    def _gather_on_cpu(self, start_E: np.ndarray, counts_E: np.ndarray, *, pin: bool) -> tuple[Tensor, Tensor]:
        offsets_E1 = np.concatenate([[0], counts_E.cumsum()])
        n_pulses = int(offsets_E1[-1])
        word_P = torch.empty(n_pulses, dtype=torch.int32, pin_memory=pin)
        charge_P = torch.empty(n_pulses, dtype=torch.int16, pin_memory=pin)
        words, charges = word_P.numpy().view(np.uint32), charge_P.numpy().view(np.uint16)
        # In pieces of about _CHUNK pulses, whose index stays in a core's cache.
        cuts = np.searchsorted(offsets_E1, np.arange(_CHUNK, n_pulses, _CHUNK))
        for low, high in zip([0, *cuts], [*cuts, len(start_E)], strict=True):
            row_P = ranges(start_E[low:high], counts_E[low:high])
            piece = slice(offsets_E1[low], offsets_E1[high])
            # clip, because the default mode checks the range once more and copies to do so
            np.take(self.arrays["word"], row_P, out=words[piece], mode="clip")
            np.take(self.arrays["charge"], row_P, out=charges[piece], mode="clip")
        return word_P, charge_P

    def _gather_resident(self, shift_E: np.ndarray, counts_E: np.ndarray) -> tuple[Tensor, Tensor]:
        assert self._resident is not None
        pin = self.device.type == "cuda"
        n_pulses = int(counts_E.sum())
        shift_DE, counts_DE = (_to(x, self.device, pin=pin) for x in (shift_E, counts_E))
        row_P = torch.repeat_interleave(shift_DE, counts_DE, output_size=n_pulses)
        row_P += torch.arange(n_pulses, device=self.device)
        words, charges = self._resident
        return words.index_select(0, row_P), charges.index_select(0, row_P)

    def to_device(self, device: torch.device | str) -> EventCache:
        """The same store with its pulses copied to a device, where `gather` then works and leaves its
        results.

        The copy is kept: asking again gives the same one.

        Raises:
            CacheError: the device has too little free memory.
        """
        device = torch.empty(0, device=device).device  # cuda becomes cuda:0
        if device in self._copies:
            return self._copies[device]
        need = self.arrays["word"].nbytes + self.arrays["charge"].nbytes
        if device.type == "cuda" and need > (free := torch.cuda.mem_get_info(device)[0]):
            raise CacheError(
                f"{need:,} bytes of pulses do not fit into the {free:,} free bytes of {device}; gather on the CPU"
            )
        moved = EventCache(self.arrays, self.path)
        word = torch.empty(self.n_pulses, dtype=torch.int32, device=device)
        charge = torch.empty(self.n_pulses, dtype=torch.int16, device=device)
        for low in range(0, self.n_pulses, 1 << 24):
            piece = slice(low, low + (1 << 24))
            word[piece] = torch.from_numpy(self.arrays["word"][piece].astype("<u4").view(np.int32))
            charge[piece] = torch.from_numpy(self.arrays["charge"][piece].astype("<u2").view(np.int16))
        moved._resident = word, charge
        self._copies[device] = moved
        return moved

    def verify(self) -> None:
        """Reads every byte and compares checksums. Raises CacheError naming the array and the batch file."""
        if self.path is None:
            return
        before = Extent()
        for shard in Manifest.read(self.path).shards:
            extent = Extent(**shard["extent"])
            for name, digest in shard["blake2b"].items():
                if checksum(self.arrays[name][before.rows(name) : extent.rows(name)]) != digest:
                    raise CacheError(
                        f"{array_file(self.path, name)} is damaged in the part from {shard['file']}: delete "
                        "the store and build it again"
                    )
            before = extent

    def _start_and_count(self, index_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        end = self.arrays["end"]
        start_E = np.where(index_E > 0, end[np.maximum(index_E - 1, 0)], 0)
        return start_E, end[index_E] - start_E


def open_cache(path: str | Path) -> EventCache:
    """Opens a finished store. File sizes are checked here, contents by `EventCache.verify`.

    Raises:
        CacheError: the store is unfinished, damaged or of another version.
    """
    path = Path(path)
    manifest = Manifest.read(path)
    if not manifest.complete:
        raise CacheError(f"the build of {path} was interrupted: run it again, it goes on where it stopped")
    return EventCache(open_arrays(path, manifest), path)


def build_cache(
    source: KaggleFolder | str | Path,
    out: str | Path,
    *,
    limit_events: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> EventCache:
    """Converts a Kaggle-layout folder into a store. Batch files that are already in it are not read again.

    Args:
        limit_events: stop after this many events. A store that has as many already is left as it is.
        progress: called with the number of events done so far, after each batch file.

    Raises:
        DataError: what is wrong with the source; batch files before the faulty one stay converted.
        CacheError: `out` was made from other files.
        StorageError: `out` cannot be written.
    """
    source = source if isinstance(source, KaggleFolder) else KaggleFolder(source)
    out = Path(out)
    wanted = np.inf if limit_events is None else limit_events
    with locked(out):
        manifest = Manifest.continued(out, source.batch_files.values(), source.meta_file)
        if manifest.shards and manifest.shards[-1]["cut"] and manifest.extent.events < wanted:
            manifest.shards.pop()
            manifest.complete = False
        known = {shard["file"] for shard in manifest.shards}
        for batch_id, file in source.batch_files.items():
            left = wanted - manifest.extent.events
            if left <= 0 or file.name in known:
                continue
            pulses = source.read_batch(batch_id)
            truth = source.read_truth(pulses.event_id_E.numpy())
            cut = pulses.n_events > left
            arrays = pack(slice_events(pulses, 0, int(left)) if cut else pulses)
            if truth is not None:
                arrays |= {name: values[: len(arrays["end"])] for name, values in truth.items()}
            manifest.complete = False
            manifest.arrays = manifest.arrays or [name for name in ARRAYS if name in arrays]
            if lost := set(manifest.arrays) - set(arrays):
                raise CacheError(
                    f"{out} has {', '.join(sorted(lost))}, but {source.path} has lost them: restore or "
                    "build another store"
                )
            shard = {"file": file.name, "fingerprint": fingerprint(file), "cut": cut}
            append_shard(out, manifest, arrays, shard)
            if progress is not None:
                progress(manifest.extent.events)
        if not manifest.complete:
            _refuse_repeats(EventCache(open_arrays(out, manifest)), out)
            manifest.complete = True
            manifest.write(out)
    return open_cache(out)


def _refuse_repeats(cache: EventCache, out: Path) -> None:
    """Event ids tell training and held-out events apart, so they must be unique over all batch files."""
    sorted_ids = np.sort(cache.event_id)
    if (sorted_ids[1:] == sorted_ids[:-1]).any():
        repeat = find_repeat(np.asarray(cache.event_id)) or 0
        raise EventIdError(
            f"event_id {cache.event_id[repeat]} is in two batch files of the source",
            file=array_file(out, "event_id"),
            row=repeat,
        )


def _to(array: np.ndarray, device: torch.device, *, pin: bool) -> Tensor:
    tensor = torch.from_numpy(array)
    tensor = tensor.pin_memory() if pin else tensor
    return tensor.to(device, non_blocking=pin)
