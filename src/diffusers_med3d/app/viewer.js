// Shows volumes of the page with NiiVue: three planes and a rendering that turns, window and level, the download.
// The page calls window.med3d.show({slot, url, file_name, title}) for a place <div class="med3d-viewer" data-slot=...>.

const VIEWS = { All: "sliceTypeMultiplanar", Axial: "sliceTypeAxial", Coronal: "sliceTypeCoronal", Sagittal: "sliceTypeSagittal", "3D": "sliceTypeRender" };
const DEGREES_PER_SECOND = 30;
const LINKED = { left: "right", right: "left" }; // viewers that turn together and share a crosshair
const viewers = {};
let niivue; // the module, fetched when the first volume is there

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function range(title, apply) {
  const input = element("input", { type: "range", min: 0, max: 1, step: 0.01 });
  const value = element("output");
  input.addEventListener("input", apply);
  return { input, value, label: element("label", {}, title, input, value) };
}

class Viewer {
  constructor(place, { Niivue, SHOW_RENDER, MULTIPLANAR_TYPE }) {
    this.place = place;
    this.nv = new Niivue({
      backColor: [0, 0, 0, 1],
      crosshairColor: [0.43, 0.64, 0.86, 0.8],
      crosshairWidth: 0.3,
      dragAndDropEnabled: false,
      fontColor: [1, 0.85, 0.4, 1],
      isRadiologicalConvention: true, // as the pictures of diffusers_med3d.viz: the patient's right is on the left
      isResizeCanvas: true,
      sagittalNoseLeft: true,
      showAllOrientationMarkers: true,
      loadingText: "",
      multiplanarLayout: MULTIPLANAR_TYPE.GRID,
      multiplanarShowRender: SHOW_RENDER.ALWAYS,
      show3Dcrosshair: false,
      tileMargin: 16,
    });
    this.canvas = element("canvas", { tabIndex: 0 });
    this.title = element("span", { className: "title" });
    this.download = element("a", { className: "download", textContent: "Download NIfTI" });
    this.position = element("div", { className: "position" });
    const changed = () => this.both((one) => one.applyWindow(this.window.input.value, this.level.input.value));
    this.window = range("Window", changed);
    this.level = range("Level", changed);
    this.views = Object.keys(VIEWS).map((name) =>
      element("button", { type: "button", textContent: name, onclick: () => this.both((one) => one.view(name)) }),
    );
    this.turning = element("button", { type: "button", textContent: "Turn", onclick: () => this.turn() });
    this.press(this.turning, false);
    this.nv.onLocationChange = (location) => this.tell(location);
  }

  async start() {
    const box = element("div", { className: "canvas-box" }, this.canvas);
    this.place.replaceChildren(
      element("div", { className: "bar" }, this.title, this.download),
      element("div", { className: "bar" }, ...this.views, this.turning),
      element("div", { className: "bar" }, this.window.label, this.level.label),
      box,
      this.position,
    );
    await this.nv.attachToCanvas(this.canvas);
    if (!this.nv.gl) throw new Error("no WebGL 2");
    this.view("All");
  }

  async load({ url, file_name, title }) {
    this.title.textContent = title;
    this.download.href = url;
    this.download.download = file_name;
    const { renderAzimuth, renderElevation } = this.nv.scene; // a new volume is seen as the one before it was
    await this.nv.loadVolumes([{ url, name: file_name, colormap: "gray" }]);
    this.nv.setRenderAzimuthElevation(renderAzimuth, renderElevation);
    this.applyWindow(1, 0.5);
    this.nv.createOnLocationChange();
    this.place.dataset.shown = url;
  }

  // Does something in this viewer and in the one beside it.
  both(action) {
    [this, viewers[LINKED[this.place.dataset.slot]]].filter(Boolean).forEach(action);
  }

  applyWindow(window, level) {
    const width = Math.max(0.01, Number(window)), centre = Number(level);
    for (const [control, number] of [[this.window, width], [this.level, centre]]) {
      control.input.value = number;
      control.value.value = number.toFixed(2);
    }
    const [volume] = this.nv.volumes;
    if (!volume) return;
    volume.cal_min = centre - width / 2;
    volume.cal_max = centre + width / 2;
    this.nv.updateGLVolume();
  }

  view(name) {
    this.nv.setSliceType(this.nv[VIEWS[name]]);
    this.views.forEach((button) => this.press(button, button.textContent === name));
  }

  turn() {
    this.press(this.turning, this.turning.ariaPressed !== "true");
    let before = performance.now(), asked = before;
    const step = (now) => {
      if (this.turning.ariaPressed !== "true" || !this.canvas.isConnected) return;
      const { renderAzimuth, renderElevation } = this.nv.scene;
      const degrees = (DEGREES_PER_SECOND * (now - before)) / 1000;
      this.both((one) => one.nv.setRenderAzimuthElevation((renderAzimuth + degrees) % 360, renderElevation));
      const rest = Math.min(1000, now - asked); // without a GPU a frame takes long: the page's buttons get as long
      before = now;
      setTimeout(() => {
        asked = performance.now();
        requestAnimationFrame(step);
      }, rest);
    };
    requestAnimationFrame(step);
  }

  press(button, on) {
    button.ariaPressed = String(on);
  }

  tell({ mm, values }) {
    const [x, y, z] = mm;
    const at = [[x, "R", "L"], [y, "A", "P"], [z, "S", "I"]].map(([v, more, less]) => `${Math.abs(v).toFixed(0)} mm ${v < 0 ? less : more}`);
    const value = values?.[0]?.value;
    this.position.textContent = `${at.join(", ")}${value === undefined ? "" : `: intensity ${value.toFixed(2)}`}`;
  }
}

async function show(result) {
  if (!result) return;
  const place = document.querySelector(`.med3d-viewer[data-slot="${result.slot}"]`);
  try {
    niivue ??= await import("./niivue.js");
    if (viewers[result.slot]?.place !== place) {
      const viewer = (viewers[result.slot] = new Viewer(place, niivue));
      await viewer.start();
      const other = viewers[LINKED[result.slot]];
      if (other) {
        viewer.nv.broadcastTo([other.nv], { "2d": true, "3d": true });
        other.nv.broadcastTo([viewer.nv], { "2d": true, "3d": true });
      }
    }
    await viewers[result.slot].load(result);
  } catch (error) {
    console.error(error);
    const link = element("a", { className: "download", href: result.url, download: result.file_name, textContent: "Download NIfTI" });
    const reason = "This browser cannot show the volume: it needs WebGL 2. ";
    place.replaceChildren(element("div", { className: "bar" }, element("span", { textContent: reason }), link));
    delete viewers[result.slot];
  }
}

window.med3d = { show, viewers };
