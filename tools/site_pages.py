"""MkDocs' hooks: pages that are made of the code or lie outside docs/, links between them, equations as MathML."""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools import site_text

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the site that lie at the repository's root."""
MADE = re.compile(r"^<!-- (keys|switches|recipes|teachers|commands)(?:: ([\w-]+))? -->$", re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
NAME = re.compile(r"(?<![\[`])`(d2o(?:\.\w+)+)`(?![\]`])")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
TEX = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\(?P<block>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The API's pages into the navigation."""
    pages = [file for file, _ in site_text.api_pages()]
    for entry in config.nav or []:
        if "API" in entry:
            entry["API"] = pages
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages of the repository's root, the API's, and the files that pages point at."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page, text in site_text.api_pages():
        files.append(File.generated(config, page, content=text))
    wanted = {name for file in files if file.is_documentation_page() for name in outside_of(file)}
    for name in sorted(wanted):
        files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


def source_of(uri: str) -> str:
    """Where a page of the site lies in the repository."""
    return next((source for source, page in OUTSIDE.items() if page == uri), f"docs/{uri}")


def outside_of(file: File) -> set[str]:
    """Files of the repository that a page points at and that are no pages."""
    here = posixpath.dirname(source_of(file.src_uri))
    targets = {posixpath.normpath(posixpath.join(here, link[1])) for link in LINK.findall(file.content_string)}
    return {
        name
        for name in targets
        if name not in OUTSIDE and not name.startswith(("docs/", "../")) and (ROOT / name).is_file()
    }


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """What is made of the code, put in its place; links as they are on the site; names of the API as links to it."""
    markdown = MADE.sub(made, markdown)
    here = posixpath.dirname(source_of(page.file.src_uri))
    api = not page.file.src_uri.startswith(("api/", "changelog"))
    text, end = [], 0
    for fence in [*FENCE.finditer(markdown), None]:
        part = markdown[end : fence.start() if fence else None]
        part = LINK.sub(lambda link: link[1] + relinked(link[2], here, page.file.src_uri) + link[3], part)
        text.append(NAME.sub(api_link, part) if api else part)
        if fence:
            text.append(fence[0])
            end = fence.end()
    return "".join(text)


def made(place: re.Match[str]) -> str:
    what, of = place[1], place[2]
    if what == "keys":
        return site_text.all_keys()
    if what == "switches":
        return site_text.switches(of)
    if what == "recipes":
        return site_text.recipes(of)
    return site_text.teachers() if what == "teachers" else site_text.commands()


def relinked(link: str, here: str, uri: str) -> str:
    """A link between files of the repository -> between pages and files of the site."""
    if ":" in link:
        return link
    target = posixpath.normpath(posixpath.join(here, link))
    target = OUTSIDE.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else f"files/{target}")
    return posixpath.relpath(target, posixpath.dirname(uri) or ".")


def api_link(name: re.Match[str]) -> str:
    """`d2o.losses.score.sid_loss` as a link, if it is something in a module of the API's pages."""
    in_api = any(name[1].startswith(f"{module}.") for module in MODULES)
    return f"[`{name[1]}`][{name[1]}]" if in_api else name[0]


MODULES = [module for package in site_text.API if package != "d2o" for module in site_text.modules(package)]


def on_page_content(html_text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """TeX -> MathML, which browsers show without a script."""
    from latex2mathml.converter import convert

    def mathml(found: re.Match[str]) -> str:
        tex, block = html.unescape(found["tex"]).strip(), found["block"] == "["
        shown = convert(tex, display="block" if block else "inline")
        return f'<{found["tag"]} class="arithmatex">{shown}</{found["tag"]}>'

    return TEX.sub(mathml, html_text)
