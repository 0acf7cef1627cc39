"""Sphinx for the whole repository: pages link to README.md and to each other, and every link and anchor is checked."""

project = "oauth_store"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
exclude_patterns = [".*", "build", "dist", "tests"]
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_title = "oauth_store"
html_copy_source = False
html_show_copyright = False
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "both"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autoclass_content = "both"
python_maximum_signature_line_length = 100
default_role = "literal"  # docstrings put names in single backticks
