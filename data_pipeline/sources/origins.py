"""Where well-known data come from, and under which licence, as their publishers say."""

from __future__ import annotations

from data_pipeline.sources.config import (
    DatasetsSource,
    Preset,
    PythonStdlibSource,
    SourceConfig,
)

LICENSES: dict[Preset, str] = {
    "wikitext_103_raw": "articles of Wikipedia; CC BY-SA 3.0 and GFDL",
    "c4_en": "web pages of Common Crawl; ODC-BY 1.0, and Common Crawl's terms of use",
    "zyda_2": "a selection of web data sets; ODC-BY 1.0, and the terms of its parts",
    "codeparrot_clean_train": "files of GitHub; each has the licence of its repository",
    "codeparrot_clean_valid": "files of GitHub; each has the licence of its repository",
    "fineweb": "web pages of Common Crawl; ODC-BY 1.0, and Common Crawl's terms of use",
    "pile_uncopyrighted": "the Pile without its parts under copyright; each part has its own terms",
    "open_web_math": "web pages of Common Crawl; ODC-BY 1.0, and Common Crawl's terms of use",
    "code_instructions_120k": "tasks and solutions that language models wrote; no licence is stated",
    "the_stack": "files of GitHub; each has its own permissive licence, and terms to accept",
}


def origin_of(source: SourceConfig) -> str | None:
    """Return the origin and licence of a source that says what it reads; None for any other."""
    if isinstance(source, PythonStdlibSource):
        return "the standard library of Python; PSF-2.0, and the licences of its parts"
    if not isinstance(source, DatasetsSource):
        return None
    if source.preset is not None:
        return f"{source.preset}: {LICENSES[source.preset]}"
    # A path of this machine says nothing to others.
    is_hub_name = source.dataset is not None and source.dataset.count("/") == 1
    if not is_hub_name or source.dataset is None or source.dataset.startswith((".", "/", "~")):
        return None
    return f"{source.dataset} on huggingface.co; its page names the licence"
