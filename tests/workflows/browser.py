"""ComfyUI's front end in a headless Chromium."""

import base64
import shutil
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# Said before the page opens: no tutorial over the canvas, and text that stays when zoomed out.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Locale": "en",
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
READY = "window.app?.graph && app.canvas && app.extensionManager"
DROP = """([bytes, name, type]) => {
    const data = Uint8Array.from(atob(bytes), letter => letter.charCodeAt(0));
    const files = new DataTransfer();
    files.items.add(new File([data], name, {type}));
    const target = document.querySelector('#graph-canvas');
    for (const event of ['dragenter', 'dragover', 'drop'])
        target.dispatchEvent(new DragEvent(event, {
            dataTransfer: files, bubbles: true, cancelable: true, clientX: 800, clientY: 500}));
}"""
# Zoomed so that all nodes are seen, between the front end's bars.
FIT = """() => {
    const areas = app.graph._nodes.map(n => [n.pos[0], n.pos[1], n.size[0], n.size[1]]);
    const left = Math.min(...areas.map(a => a[0])) - 40;
    const top = Math.min(...areas.map(a => a[1])) - 110;
    const right = Math.max(...areas.map(a => a[0] + a[2])) + 40;
    const bottom = Math.max(...areas.map(a => a[1] + a[3])) + 40;
    const scale = Math.min((innerWidth - 80) / (right - left), (innerHeight - 160) / (bottom - top));
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [70 / scale - left, 130 / scale - top];
    app.graph.setDirtyCanvas(true, true);
}"""
SHOWN = """() => app.graph._nodes.filter(n => n.type === 'SaveImage').some(
        n => n.imgs?.some(image => image.naturalWidth > 0))
    || [...document.querySelectorAll('[data-node-id] img')].some(
        image => image.src.includes('type=output') && image.naturalWidth > 0)"""


def find() -> str | None:
    """The path of a Chromium on this machine."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Canvas:
    """One page with the front end of a server, ready to use; `errors` are the page's exceptions."""

    def __init__(self, playwright, server, seconds: float):
        self.server, self.errors = server, []
        for name, value in SETTINGS.items():
            server.post(f"/settings/{name}", value)
        self.browser = playwright.chromium.launch(executable_path=find(), args=list(FLAGS))
        self.page = self.browser.new_page(
            viewport={"width": 1800, "height": 900}, locale="en-US", reduced_motion="reduce"
        )
        self.page.add_init_script("localStorage.setItem('vueNodesBannerDismissed', 'true')")
        self.page.set_default_timeout(seconds * 1000)
        self.page.on("pageerror", self._note)
        self.page.goto(server.url, wait_until="domcontentloaded")
        self.page.wait_for_function(READY)
        self.page.get_by_test_id("queue-button").first.wait_for()

    def _note(self, error) -> None:
        """Newer front ends also ask addresses on the internet, which the server's policy forbids."""
        if str(error) != "Failed to fetch":
            self.errors.append(str(error))

    def open_template(self, project: str, name: str) -> None:
        """What a click in the template browser does: fetch the file and load it."""
        load = """async ([url, name]) => {
            const graph = await (await fetch(url)).json();
            await app.loadGraphData(graph, true, true, name);
        }"""
        url = f"/api/workflow_templates/{project}/{name}.json"
        self.page.evaluate(load, [url, f"{name}.json"])

    def drop(self, file: Path, kind: str) -> None:
        """Drop a file on the canvas."""
        self.page.evaluate(DROP, [base64.b64encode(file.read_bytes()).decode(), file.name, kind])

    def wait_for_nodes(self, count: int) -> None:
        self.page.wait_for_function(f"app.graph._nodes.length === {count}")

    def clear(self) -> None:
        self.page.evaluate("app.graph.clear()")
        self.wait_for_nodes(0)

    def graph(self) -> dict:
        """The graph as the front end would save it."""
        return self.page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")

    def unknown(self) -> list[str]:
        """Nodes that the front end marks as missing."""
        known = "n => !LiteGraph.registered_node_types[n.type] || n.has_errors"
        return self.page.evaluate(f"app.graph._nodes.filter({known}).map(n => n.type)")

    def picture(self, path: Path) -> None:
        """A screenshot of the whole graph."""
        self.page.evaluate(FIT)
        self.page.wait_for_timeout(800)
        self.page.screenshot(path=path)

    def run(self) -> dict:
        """Click Run and wait until the picture is on the canvas; returns the history's entry."""
        before = set(self.server.get("/history"))
        self.page.get_by_test_id("queue-button").first.click()
        self.page.wait_for_function(SHOWN)
        (entry,) = (e for id, e in self.server.get("/history").items() if id not in before)
        return entry

    def close(self) -> None:
        self.browser.close()
