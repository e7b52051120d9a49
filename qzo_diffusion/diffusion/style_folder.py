"""Read a folder of images as a list of samples, and record the fate of every file in it.

No image is dropped silently: each becomes a sample, or is listed in `bad` with a reason. The choice
of held-out images depends on their bytes and the seed alone. So a renamed or added file does not
move others between training and validation, and copies of one picture are never on both sides.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qzo_diffusion.core.errors import ConfigError, DataError
from qzo_diffusion.diffusion.buckets import losses, nearest_bucket
from qzo_diffusion.diffusion.captions import Caption, check_any_caption, read_captions
from qzo_diffusion.diffusion.images import IMAGE_SUFFIXES, BadImage, is_image_name, open_image
from qzo_diffusion.diffusion.listing import (
    Listing,
    list_files,
    listed,
    notes_on_left_out,
    relative_id,
)
from qzo_diffusion.diffusion.masks import MaskKind, hash_of_visible, mask_file, open_masked
from qzo_diffusion.diffusion.sample import Sample
from qzo_diffusion.diffusion.style_notes import (
    bad_by_kind,
    counted,
    kind_of_file,
    notes_on_copies,
    notes_on_files,
    notes_on_masks,
    notes_on_missing_captions,
    notes_on_repeats,
    notes_on_shapes,
)

HOLD_OUT_FROM = 20
_HOLD_OUT_LEAST, _HOLD_OUT_MOST = 4, 32


@dataclass(frozen=True)
class StyleFolder:
    """All samples ordered by split and path, the unusable images as (id, reason), and remarks for
    the user.

    There is one remark for each kind of event, however many files it is about. Remarks on unused
    files, on copies and on the split come first; remarks on captions follow.
    """

    samples: list[Sample]
    bad: list[tuple[str, str]]
    notes: list[str]

    @property
    def train(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.split == "train"]

    @property
    def validation(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.split == "validation"]


def read_style_folder(
    folder: Path,
    *,
    resolution: int,
    caption: str | None = None,
    trigger: str | None = None,
    repeats: int = 1,
    strict: bool = False,
    validation_dir: Path | None = None,
    seed: int = 0,
    masks: MaskKind = "none",
) -> StyleFolder:
    """Open every image below `folder` and its sub-folders, without hidden ones and links to
    folders.

    Without `validation_dir`, a set of 20 different images or more holds out a tenth of them (4 to
    32). A validation folder may lie inside the folder, or the folder inside it: neither then counts
    the images of the other.

    Args:
        resolution: the square root of the area of a bucket, in pixels.
        caption: text for images without one.
        trigger: replaces "[trigger]" in captions.
        repeats: how often each training image comes in an epoch; 1 means once.
        strict: one bad image is an error.
        masks: where the masks of images come from.

    Raises:
        DataError: no such folder, no usable image, wrong captions, no mask where masks are asked
            for, or a bad image when strict.
        ConfigError: resolution below 16, repeats below 1.
    """
    if repeats < 1:
        raise ConfigError(f"repeats: {repeats}", "1 (once an epoch) or more", "raise data.repeats")
    if validation_dir is None:
        read, on_captions = _read(folder, resolution, caption, trigger, masks, other=None)
        held_out, remark = _choose_held_out([sample.sha256 for sample in read.samples], seed)
        samples = [
            _with_split(sample, sample.sha256 in held_out, repeats) for sample in read.samples
        ]
        result = StyleFolder(samples, read.bad, [*read.notes, remark, *on_captions])
    else:
        result = _read_both(folder, validation_dir, resolution, caption, trigger, repeats, masks)
    _check_any_mask(result, folder, masks)
    if strict and result.bad:
        raise DataError(
            f"{len(result.bad)} unusable images: {'; '.join(bad_by_kind(result.bad))}",
            "only usable images, since --strict was given",
            "replace them, take them out of the folder, or leave out --strict to go on "
            "without them",
        )
    return replace(
        result, samples=sorted(result.samples, key=lambda sample: (sample.split, sample.id))
    )


def dataset_table(
    style_folder: StyleFolder, token_counts: Mapping[str, tuple[int, bool]] | None = None
) -> list[dict[str, object]]:
    """Return the rows of dataset.json.

    Args:
        token_counts: sample id -> (tokens, truncated). Both are null for an id that is missing.
    """
    rows: list[dict[str, object]] = []
    for sample in style_folder.samples:
        tokens, truncated = (token_counts or {}).get(sample.id, (None, None))
        rows.append(
            {
                "file": sample.id,
                "sha256": sample.sha256,
                "caption": sample.caption,
                "caption_source": sample.caption_source,
                "bucket": f"{sample.width}x{sample.height}",
                "split": sample.split,
                "repeats": sample.repeats,
                "tokens": tokens,
                "truncated": truncated,
                "mask": sample.mask,
                "notes": [*sample.notes, *sample.notes_on_shape],
            }
        )
    return rows


def summary(style_folder: StyleFolder) -> str:
    """Return a few lines for a person: splits, sources of captions, buckets, conversions, bad
    files, remarks.
    """
    samples = style_folder.samples
    buckets = [f"{sample.width}x{sample.height}" for sample in samples]
    changed = sum(bool(sample.notes) for sample in samples)
    lines = [
        f"images    {len(samples)}: {len(style_folder.train)} train, "
        f"{len(style_folder.validation)} held out",
        f"captions  {counted([sample.caption_source for sample in samples])}",
        f"buckets   {counted(buckets)}",
    ]
    if changed:
        lines.append(
            f"changed   {changed}: {counted([note for sample in samples for note in sample.notes])}"
        )
    if style_folder.bad:
        lines.append(f"unusable  {len(style_folder.bad)}")
        lines += [f"  {line}" for line in bad_by_kind(style_folder.bad)]
    return "\n".join(lines + [f"note      {note}" for note in style_folder.notes])


def _read_both(
    folder: Path,
    validation_dir: Path,
    resolution: int,
    caption: str | None,
    trigger: str | None,
    repeats: int,
    masks: MaskKind,
) -> StyleFolder:
    if os.path.realpath(folder) == os.path.realpath(validation_dir):
        raise DataError(
            f"{validation_dir} for training and for validation",
            "a validation folder with other images than those trained on",
            "choose another --validation-dir, or leave it out",
        )
    for place in (folder, validation_dir):
        _check_folder(place)
    train, on_captions = _read(folder, resolution, caption, trigger, masks, other=validation_dir)
    held_out, on_held_out = _read(validation_dir, resolution, caption, trigger, masks, other=folder)
    renamed = [replace(sample, id=f"validation:{sample.id}") for sample in held_out.samples]
    samples = [_with_split(sample, False, repeats) for sample in train.samples]
    samples += [_with_split(sample, True, repeats) for sample in renamed]
    bad = train.bad + [(f"validation:{name}", reason) for name, reason in held_out.bad]
    notes = train.notes + [f"validation: {note}" for note in held_out.notes]
    trained = {sample.sha256 for sample in train.samples}
    if shared := [sample.id for sample in renamed if sample.sha256 in trained]:
        notes.append(f"{len(shared)} validation images are also trained on: {listed(shared)}")
    return StyleFolder(
        samples, bad, notes + on_captions + [f"validation: {note}" for note in on_held_out]
    )


def _with_split(sample: Sample, held_out: bool, repeats: int) -> Sample:
    return (
        replace(sample, split="validation", repeats=1)
        if held_out
        else replace(sample, repeats=repeats)
    )


def _read(
    folder: Path,
    resolution: int,
    caption: str | None,
    trigger: str | None,
    masks: MaskKind,
    *,
    other: Path | None,
) -> tuple[StyleFolder, list[str]]:
    """Read one folder with everything in the split "train" once; return the remarks on its captions
    separately.
    """
    _check_folder(folder)
    listing = list_files(folder, skip=other)
    images = [path for path in listing.files if is_image_name(path)]
    if not images:
        raise _no_images(folder, listing)
    _check_any_usable(folder, images)
    captions = read_captions(folder, images, fallback=caption, trigger=trigger, other=other)
    samples: list[Sample] = []
    bad: list[tuple[str, str]] = []
    for path in images:
        try:
            samples.append(_sample(folder, path, captions.by_file[path], resolution, masks))
        except BadImage as error:
            bad.append((relative_id(path, folder), error.reason))
    # Check again: all captions may belong to bad images.
    check_any_caption((captions.by_file[sample.path] for sample in samples), folder)
    if masks == "file":
        listing.forget({mask_file(path) for path in images})
    left_out = notes_on_left_out(listing, folder)
    notes = [
        *left_out,
        *notes_on_files(listing.files),
        *notes_on_copies(samples),
        *notes_on_shapes(samples),
        *notes_on_repeats(samples),
        *notes_on_masks(samples, masks),
    ]
    return StyleFolder(samples, bad, notes), [*notes_on_missing_captions(samples), *captions.notes]


def _sample(folder: Path, path: Path, caption: Caption, resolution: int, masks: MaskKind) -> Sample:
    opened, mask = open_masked(path, masks)
    width, height = nearest_bucket(*opened.image.size, resolution)
    cut, enlarged = losses(opened.image.size, (width, height))
    return Sample(
        id=relative_id(path, folder),
        path=path,
        sha256=_sha256(path) if mask is None else hash_of_visible(opened.image, mask),
        mask="none" if mask is None else masks,
        caption=caption.text,
        caption_source=caption.source,
        caption_place=caption.place,
        cut=cut,
        enlarged=enlarged,
        width=width,
        height=height,
        notes=opened.notes,
        split="train",
        repeats=1,
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_any_mask(found: StyleFolder, folder: Path, masks: MaskKind) -> None:
    if masks == "none" or any(sample.mask != "none" for sample in found.samples):
        return
    expected = "a file NAME_mask.png beside NAME.png" if masks == "file" else "an alpha channel"
    raise DataError(
        f"data.masks={masks}, and no image in {folder} has such a mask",
        f"{expected}, for at least one image",
        "add masks, or use data.masks=none",
    )


def _choose_held_out(hashes: Sequence[str], seed: int) -> tuple[set[str], str]:
    """Return the hashes of the images to hold out, and a remark with their number or the reason for
    none.
    """
    different = sorted(
        set(hashes), key=lambda name: hashlib.blake2b(f"{seed}:{name}".encode()).digest()
    )
    if len(different) < HOLD_OUT_FROM:
        return set(), (
            f"no image is held out: {len(different)} different images, {HOLD_OUT_FROM} are needed; "
            "pass --validation-dir to measure a validation loss"
        )
    count = min(max(len(different) // 10, _HOLD_OUT_LEAST), _HOLD_OUT_MOST)
    return set(
        different[:count]
    ), f"{count} of {len(different)} different images are held out for the validation loss"


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        got = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
        raise DataError(
            got, "a folder of images", "pass the path of a folder that holds the images"
        )


def _check_any_usable(folder: Path, images: Sequence[Path]) -> None:
    """Check, before captions are read, that at least one image can be read.

    Remarks on captions are of no use to a user whose images can't be read.

    Raises:
        DataError: no image can be read.
    """
    bad = []
    for path in images:
        try:
            open_image(path)
        except BadImage as error:
            bad.append((relative_id(path, folder), error.reason))
        else:
            return
    raise DataError(
        f"none of the {len(bad)} images in {folder} can be used: {'; '.join(bad_by_kind(bad))}",
        "at least one image that can be read",
        "replace the files, or convert them to PNG or JPEG",
    )


def _no_images(folder: Path, listing: Listing) -> DataError:
    kinds = counted([kind_of_file(path) for path in listing.files])
    held = f"only other files ({kinds})" if kinds else "no files"
    return DataError(
        "; ".join([f"{folder} holds {held}", *notes_on_left_out(listing, folder)]),
        f"at least one image ({', '.join(sorted(IMAGE_SUFFIXES))}), in it or in its sub-folders",
        "put images into it, convert those of other formats, or pass another folder",
    )
