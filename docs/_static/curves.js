/* Draws the curves that docs/curves.py wrote into the page. */
"use strict";

for (const data of document.querySelectorAll(".curve-data")) {
  Bokeh.embed.embed_item(JSON.parse(JSON.parse(data.textContent)), data.parentElement);
}
