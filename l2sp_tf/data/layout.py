"""Finds the splits, the classes and the images of a folder or a zip, as people have them."""

import dataclasses

from l2sp_tf.data.headers import KINDS, kind_of
from l2sp_tf.data.sets import ACCEPTED, one_form
from l2sp_tf.files.errors import InputError

TRAIN, TEST, VALIDATION = ("train", "training"), ("test", "testing"), ("val", "validation", "valid")
SPLITS = (*TRAIN, *TEST, *VALIDATION)
ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".webp")
SYSTEM = {  # in small letters; what begins with a dot is left out too
    *("__macosx", "icon\r"),  # macOS
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "recycler", "system volume information"),
    *("lost+found", "@eadir", "#recycle", "@recycle", "@tmp"),  # Linux and network drives
}
FOLDER, FILE, OTHER = "folder", "file", "other"  # others are pipes and devices: reading one might never end
MOST_STEPS = 8  # into folders that are alone: links may lead in a circle


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the images of a data set are.

    Attributes:
        splits: {"train" or "test": {class: [place, ...]}}; a place is a path below the root, classes are in the form NFC.
        notes: what was left out or taken for something else, in words.
    """

    splits: dict
    notes: tuple


def is_system(name):
    """Whether a file or folder of this name belongs to a system, a backup or a tool, and not to the data."""
    return name.startswith((".", "~$")) or name.endswith("~") or name.lower() in SYSTEM


def is_image(name, head):
    """Whether a file is taken for an image: by the ending of its name, or else by its first bytes, which `head` returns."""
    return name.lower().endswith(ENDINGS) or kind_of(head()) is not None


def find_layout(tree, where, partial=False):
    """Finds the images of a data set, and checks that they lie in <split>/<class>/<image>.

    The training split is train/ or training/; the test split is test/ or testing/, or else the only one of val/, validation/
    and valid/. A folder that is alone is stepped into. System files are left out.

    Args:
        tree: its `children(place)` are a dict from names to FOLDER, FILE or OTHER, and `head(place)` are the first bytes of
            a file; the place of a folder ends in "/", and that of the root is "".
        where: the path of the root, for messages.
        partial: whether a split may lack classes of the other.

    Raises:
        InputError: the layout is another.
    """
    search = _Search(tree, where)
    top, children = search.top()
    chosen, notes = _choose_splits(search, top, children)
    found = {split: search.classes(f"{top}{name}/") for split, name in chosen.items()}
    _check_classes(found, {split: f"{where}/{top}{name}" for split, name in chosen.items()}, partial)
    if top:
        notes.insert(0, f"read from its folder {top.rstrip('/')}")
    if search.left_out:
        notes.append(f"{search.left_out} system files or folders left out")
    return Layout(found, tuple(notes))


class _Search:
    """Looks into a tree; counts the system files and folders that it meets, and the images beside and above the splits."""

    def __init__(self, tree, where):
        self.tree, self.where, self.left_out, self.beside = tree, where, 0, 0

    def children(self, place):
        """Returns the children of a folder without those of the system: {name: FOLDER, FILE or OTHER}, sorted by name."""
        found = self.tree.children(place)
        shown = {name: found[name] for name in sorted(found) if not is_system(name)}
        self.left_out += len(found) - len(shown)
        return shown

    def is_image(self, place):
        return is_image(place, lambda: self.tree.head(place))

    def top(self):
        """Returns the place that holds the splits, and its children: the root, or a folder that is alone in it."""
        place, children = "", self.children("")
        best = place, children
        for _ in range(MOST_STEPS):
            folders = _folders(children)
            self.beside += _count_images(children)
            if any(name.lower() in SPLITS for name in folders):
                best = place, children
            if len(folders) != 1:
                break
            place += f"{folders[0]}/"
            children = self.children(place)
        return best

    def classes(self, place):
        """Returns the images in the class folders of a split: {class: [place, ...]}."""
        found = {}
        for name, kind in self.children(place).items():
            if kind != FOLDER:
                raise InputError(f"{self.where}/{place}{name} lies in no class folder: the layout is <split>/<class>/<image>.")
            if one_form(name) in found:
                raise InputError(
                    f"{self.where}/{place} has two folders {one_form(name)!r}, which differ only in their Unicode form: put "
                    "their images into one."
                )
            found[one_form(name)] = self._images(f"{place}{name}/")
        return found

    def _images(self, place):
        found = []
        for name, kind in self.children(place).items():
            if kind != FILE or not self.is_image(place + name):
                entry = place + name + "/" * (kind != FILE)
                raise InputError(f"{self.where}/{entry} is not an image: class folders hold {KINDS} files only.")
            found.append(place + name)
        return found

    def count(self, place):
        """Returns the number of files below a folder that end like images, two levels deep."""
        total = 0
        for name, kind in self.children(place).items():
            total += _count_images(self.children(f"{place}{name}/") if kind == FOLDER else {name: kind})
        return total

    def has_images(self, place, children, depth):
        """Whether there are images in a folder with these children or, `depth` levels deep, below it."""
        return any(
            self.is_image(place + name)
            if kind == FILE
            else kind == FOLDER and depth and self.has_images(f"{place}{name}/", self.children(f"{place}{name}/"), depth - 1)
            for name, kind in children.items()
        )


def _folders(children):
    return [name for name, kind in children.items() if kind == FOLDER]


def _count_images(children):
    return sum(kind == FILE and name.lower().endswith(ENDINGS) for name, kind in children.items())


def _choose_splits(search, top, children):
    """Returns {"train" and "test": the name of the folder}, and notes in words."""
    where, folders = f"{search.where}/{top}".rstrip("/"), _folders(children)
    named = {}
    for name in folders:
        if name.lower() in named:
            raise InputError(f"{where} has {named[name.lower()]}/ and {name}/, which differ only in case: give one of them.")
        named[name.lower()] = name
    train, test, validation = ([named[name] for name in names if name in named] for names in (TRAIN, TEST, VALIDATION))
    for names in (train, test):
        if len(names) > 1:
            raise InputError(f"{where} has {names[0]} and {names[1]}, which mean the same split: give one of them.")
    _check_splits(search, top, children, train, test or validation)
    others = [name for name in folders if name.lower() not in SPLITS]
    if others:
        raise InputError(f"{where} has folders other than train and test: {_some(others)}.")
    notes = [] if test else [f"{validation[0]}/ used as the test split"]
    for name in validation if test else ():
        notes.append(f"{name}/ left out ({search.count(f'{top}{name}/')} images), as there is {test[0]}/")
    if search.beside:
        notes.append(f"{search.beside} images beside the splits left out")
    return {"train": train[0], "test": (test or validation)[0]}, notes


def _check_splits(search, top, children, train, test):
    """Raises unless there are a train split and one test split."""
    where, folders = f"{search.where}/{top}".rstrip("/"), _folders(children)
    has_images = not (train or test) and search.has_images(top, children, depth=1)
    if not folders and not has_images:
        raise InputError(f"{where} holds no images: give {ACCEPTED}.")
    if has_images:
        raise InputError(f"{where} has images without splits: put the classes into {where}/train and {where}/test.")
    missing = ["train/"] * (not train) + ["test/ (or val/)"] * (not test)
    if missing:
        found = f"it holds {_some(folders)}" if folders else "it holds no folder"
        raise InputError(f"{where} has no {' and no '.join(missing)}: {found}.")
    if len(test) > 1:
        raise InputError(f"{where} has {' and '.join(test)} but no test: rename the one to test with to test.")


def _check_classes(found, where, partial):
    train, test = found["train"], found["test"]
    for split, classes in found.items():
        if not any(classes.values()):
            raise InputError(f"{where[split]} holds no images.")
    if not partial and train.keys() != test.keys():
        raise InputError(
            f"The classes of {where['train']} and {where['test']} differ: only in train: {_some(train.keys() - test.keys())}; "
            f"only in test: {_some(test.keys() - train.keys())}."
        )
    for split, classes in found.items():
        for name, places in classes.items():
            if not places and not partial:
                raise InputError(f"{where[split]}/{name} holds no images: add some, or remove the class from both splits.")
        for name in train.keys() | test.keys():
            classes.setdefault(name, [])


def _some(names, limit=5):
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more
