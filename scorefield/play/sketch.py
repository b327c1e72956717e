"""The canvas of the page: white lines on black, sent as a PNG with the click that asks for a picture.

It is a plain canvas, since gradio's own editor keeps what it was sent in memory, for good.
"""

SIDE = 256
"""Pixels along a side; a line of the pen is one pixel wide at 64."""

CANVAS = f"""
<div class="pad">
  <label>Draw white lines</label>
  <canvas width="{SIDE}" height="{SIDE}" tabindex="0" aria-label="Draw white lines here"></canvas>
  <div class="tools"><button type="button" class="clear">Clear</button>
  <button type="button" class="undo">Undo</button></div>
</div>
"""

CANVAS_STYLE = """
.pad label { display: block; font-size: 14px; margin-bottom: 6px; }
.pad canvas { width: 280px; height: 280px; background: black; border-radius: 6px; cursor: crosshair;
  touch-action: none; image-rendering: pixelated; }
.pad .tools { display: flex; gap: 8px; margin-top: 6px; }
.pad button { margin: 0; font-size: 14px; line-height: 20px; font-weight: 500; padding: 4px 14px;
  border: 1px solid grey; border-radius: 6px; background: transparent; cursor: pointer; }
"""

ON_LOAD = f"""
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d"), before = [];
function blank() {{ pen.fillStyle = "black"; pen.fillRect(0, 0, {SIDE}, {SIDE}); }}
function at(event) {{
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.x) * {SIDE} / box.width, (event.clientY - box.y) * {SIDE} / box.height];
}}
let drawing = false;
blank();
canvas.addEventListener("pointerdown", (event) => {{
  before.push(pen.getImageData(0, 0, {SIDE}, {SIDE}));
  if (before.length > 20) before.shift();
  drawing = true;
  canvas.setPointerCapture(event.pointerId);
  pen.strokeStyle = "white"; pen.lineWidth = 4; pen.lineCap = pen.lineJoin = "round";
  pen.beginPath(); pen.moveTo(...at(event)); pen.lineTo(...at(event)); pen.stroke();
}});
canvas.addEventListener("pointermove", (event) => {{
  if (drawing) {{ pen.lineTo(...at(event)); pen.stroke(); }}
}});
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => {{ drawing = false; }});
element.querySelector(".clear").addEventListener("click", () => {{ before.length = 0; blank(); }});
element.querySelector(".undo").addEventListener("click", () => {{
  if (before.length) pen.putImageData(before.pop(), 0, 0);
}});
"""

SEND = """(...given) => {
  const canvas = document.querySelector("#sketch canvas");
  given[0] = canvas ? canvas.toDataURL("image/png") : "";
  return given;
}"""
