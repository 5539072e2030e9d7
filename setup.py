"""Packaging: everything comes from settings.ini, so that a fact is written once."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

minors = range(int(cfg["min_python"].split(".")[1]), 14)
status = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
extras = {name: cfg[f"{name}_requirements"].split() for name in ("app", "dicom", "dev")}
blob = f"{cfg['git_url']}/blob/{cfg['branch']}/"


def readme():
    "README.md with its relative links made absolute: the package index shows it outside the repository."
    text = (root / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\((?!https?:|#|mailto:)([^)]+)\)", rf"]({blob}\1)", text)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Changes": blob + "CHANGELOG.md"},
    license="MIT",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {status[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in minors),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_name"], f"{cfg['lib_name']}.*"]),
    package_data={cfg["lib_name"]: ["*.yaml", "*.json", "*.html", "recipes/*.yaml", "phantom_model/*"]},
    include_package_data=False,
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
