// Pages read from a file may start no worker; the search's one runs in a hidden frame instead,
// under the name by which mkdocs-material knows such a one.
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      inside.postMessage = (data) => this.tell(this, data);
      const script = inside.document.createElement("script");
      script.src = url;
      script.onload = () => {
        this.waiting.forEach((data) => this.tell(inside, data));
        this.waiting = null;
      };
      inside.document.head.append(script);
    }

    tell(target, data) {
      target.dispatchEvent(new MessageEvent("message", { data }));
      if (target === this && this.onmessage) this.onmessage({ data });
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else this.tell(this.frame.contentWindow, data);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
