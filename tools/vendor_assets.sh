#!/bin/sh
# Fetch MathJax and the widget manager, so that the book asks no other host for anything,
# and axe-core, with which "make site" tests that everybody can read and use the pages.
# Needs npm and pip. Run from the root, only to change a version, and commit the result:
#   sh tools/vendor_assets.sh
set -eu
out=book/_static/vendor
axe_out=tests/site/axe # not part of the book
mathjax=3.2.2          # what Sphinx 7 would load from a CDN; MathJax 4 is laid out anew
html_manager=1.0.15    # draws the widgets of ipywidgets 8 without a kernel
axe=4.14.1             # finds faults of accessibility in a page
ipywidgets=8.1.9       # same project: the npm package lacks the BSD license's text

t=$(mktemp -d)
trap 'rm -rf "$t"' EXIT
(cd "$t" && npm pack --silent \
  "mathjax@$mathjax" "@jupyter-widgets/html-manager@$html_manager" "axe-core@$axe")
python3 -m pip download -q --no-deps -d "$t" "ipywidgets==$ipywidgets"
python3 -m zipfile -e "$t"/ipywidgets-*.whl "$t/ipywidgets"

rm -rf "$out"
mkdir -p "$out/mathjax" "$out/widgets"
tar -xzf "$t/mathjax-$mathjax.tgz" -C "$out/mathjax" --strip-components=2 \
  package/es5/tex-mml-chtml.js package/es5/output/chtml/fonts/woff-v2
tar -xzf "$t/mathjax-$mathjax.tgz" -C "$out/mathjax" --strip-components=1 \
  package/LICENSE
tar -xzf "$t/jupyter-widgets-html-manager-$html_manager.tgz" -C "$out/widgets" \
  --strip-components=2 --wildcards \
  package/dist/embed.js 'package/dist/*.woff2' package/dist/embed.js.LICENSE.txt
cp "$t"/ipywidgets/ipywidgets-*.dist-info/licenses/LICENSE "$out/widgets/LICENSE"

rm -rf "$axe_out"
mkdir -p "$axe_out"
tar -xzf "$t/axe-core-$axe.tgz" -C "$axe_out" --strip-components=1 \
  package/axe.min.js package/LICENSE

for folder in "$out" "$axe_out"; do
  (cd "$folder" && find . -type f ! -name SHA256SUMS | LC_ALL=C sort \
    | xargs sha256sum > SHA256SUMS)
done
