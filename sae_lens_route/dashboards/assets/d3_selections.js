// the part of d3 6 that SAEDashboard's page calls: selections, with data joined to empty ones
const d3 = (() => {
  const valueOf = (value, node, i, group) =>
    typeof value === "function" ? value.call(node, node.__data__, i, group) : value;
  const inherit = (child, parent) => {
    if (child && "__data__" in parent) child.__data__ = parent.__data__;
    return child;
  };
  class Selection {
    constructor(groups, parents) { this.groups = groups; this.parents = parents; }
    each(act) {
      for (const group of this.groups) {
        group.forEach((node, i) => { if (node) act.call(node, node.__data__, i, group); });
      }
      return this;
    }
    set(value, write) {
      return this.each(function(d, i, group) { write(this, valueOf(value, this, i, group)); });
    }
    node() { return this.groups.flat().find(node => node) || null; }
    empty() { return this.node() === null; }
    select(selector) {
      const one = node => node && inherit(node.querySelector(selector), node);
      return new Selection(this.groups.map(group => group.map(one)), this.parents);
    }
    selectAll(selector) {
      const nodes = this.groups.flat().filter(node => node);
      return new Selection(nodes.map(node => [...node.querySelectorAll(selector)]), nodes);
    }
    append(tag) {
      const one = node => node && node.appendChild(inherit(document.createElement(tag), node));
      return new Selection(this.groups.map(group => group.map(one)), this.parents);
    }
    remove() { return this.each(function() { this.remove(); }); }
    attr(name, value) {
      if (arguments.length < 2) return this.node().getAttribute(name);
      return this.set(value, (node, v) =>
        v === null ? node.removeAttribute(name) : node.setAttribute(name, v));
    }
    style(name, value) {
      return this.set(value, (node, v) =>
        v === null ? node.style.removeProperty(name) : node.style.setProperty(name, v));
    }
    property(name, value) {
      if (arguments.length < 2) return this.node()[name];
      return this.set(value, (node, v) => { node[name] = v; });
    }
    text(value) { return this.set(value, (node, v) => { node.textContent = v ?? ""; }); }
    html(value) { return this.set(value, (node, v) => { node.innerHTML = v ?? ""; }); }
    on(type, act) {
      return this.each(function() {
        this["on" + type] = event => act.call(this, event, this.__data__);
      });
    }
    data(values) {
      const parents = this.parents, groups = this.groups;
      return {enter: () => ({append: tag => new Selection(groups.map((group, i) =>
        [...valueOf(values, parents[i], i, parents)].slice(group.length).map(datum => {
          const child = parents[i].appendChild(document.createElement(tag));
          child.__data__ = datum;
          return child;
        })), parents)})};
    }
  }
  const top = [document.documentElement];
  return {
    select: what => new Selection(
      [[typeof what === "string" ? document.querySelector(what) : what]], top),
    selectAll: selector => new Selection([[...document.querySelectorAll(selector)]], top),
  };
})();
