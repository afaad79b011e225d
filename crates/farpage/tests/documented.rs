//! Every public item that the documentation shows has an example that is run: read from the crate's source, so that it
//! needs no documentation built.
//!
//! A *type* (or function) has one if its own text holds a code block that is tested, or names the item whose example it
//! shares: "see the example of [`Region`]". A *method* has one if it does either, or is used in the example that its type
//! has or shares, in that of another method, of a module or of the crate. What is `#[doc(hidden)]` promises nothing and needs none.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use syn::{Attribute, Expr, ImplItem, Item, Lit, Meta, TraitItem, Type, UseTree, Visibility};

/// A module's path below the crate, as `dax::file`.
type Module = String;

#[derive(Default)]
struct Crate {
    modules: BTreeMap<Module, Vec<Item>>,
    docs: BTreeMap<Module, String>,
    visible: BTreeSet<Module>,
}

/// What is looked at: a type or function, by module and name, and what belongs to it.
struct Thing {
    docs: String,
    methods: Vec<(String, String)>,
}

fn join(module: &str, name: &str) -> String {
    if module.is_empty() { name.into() } else { format!("{module}::{name}") }
}

fn docs_of(attrs: &[Attribute]) -> String {
    let mut text = String::new();
    for attr in attrs.iter().filter(|a| a.path().is_ident("doc")) {
        if let Meta::NameValue(nv) = &attr.meta
            && let Expr::Lit(lit) = &nv.value
            && let Lit::Str(line) = &lit.lit
        {
            text.push_str(&line.value());
            text.push('\n');
        }
    }
    text
}

fn is_hidden(attrs: &[Attribute]) -> bool {
    attrs.iter().any(
        |a| matches!(&a.meta, Meta::List(l) if a.path().is_ident("doc") && l.tokens.to_string() == "hidden"),
    )
}

/// Only under `cfg(test)`, `cfg(loom)` and the like.
fn is_for_tests(attrs: &[Attribute]) -> bool {
    let only = |l: &syn::MetaList| {
        let text = l.tokens.to_string();
        !text.contains("not") && ["test", "loom", "shuttle"].iter().any(|word| text.contains(word))
    };
    attrs.iter().any(|a| matches!(&a.meta, Meta::List(l) if a.path().is_ident("cfg") && only(l)))
}

fn is_public(vis: &Visibility) -> bool {
    matches!(vis, Visibility::Public(_))
}

impl Crate {
    fn read(src: &Path) -> Self {
        let mut all = Self::default();
        all.visible.insert(String::new());
        all.read_module(src, &src.join("lib.rs"), String::new());
        all
    }

    fn read_module(&mut self, dir: &Path, file: &Path, module: Module) {
        let text = std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        self.docs.insert(module.clone(), docs_of(&parsed.attrs));
        self.add(dir, module, parsed.items);
    }

    fn add(&mut self, dir: &Path, module: Module, items: Vec<Item>) {
        for item in &items {
            let Item::Mod(m) = item else { continue };
            if is_for_tests(&m.attrs) {
                continue;
            }
            let name = m.ident.to_string();
            let path = join(&module, &name);
            if is_public(&m.vis) && !is_hidden(&m.attrs) && self.visible.contains(&module) {
                self.visible.insert(path.clone());
            }
            let sub: PathBuf = dir.join(&name);
            match &m.content {
                Some((_, items)) => self.add(&sub, path, items.clone()),
                None if sub.join("mod.rs").exists() => self.read_module(&sub, &sub.join("mod.rs"), path),
                None => self.read_module(&sub, &dir.join(format!("{name}.rs")), path),
            }
        }
        self.modules.insert(module, items);
    }

    /// Where what `module` calls `name` is defined.
    fn resolve(&self, module: &str, name: &str, depth: usize) -> Option<(Module, String)> {
        let items = self.modules.get(module).filter(|_| depth < 8)?;
        if items.iter().any(|item| name_of(item).is_some_and(|(n, ..)| n == name)) {
            return Some((module.into(), name.into()));
        }
        let mut found = Vec::new();
        for item in items {
            if let Item::Use(u) = item {
                uses(&u.tree, &mut Vec::new(), &mut found);
            }
        }
        let (path, _) = found.into_iter().find(|(_, alias)| alias == name)?;
        let (last, path) = path.split_last()?;
        self.resolve(&self.module_at(module, path), last, depth + 1)
    }

    fn module_at(&self, from: &str, path: &[String]) -> Module {
        let mut at = from.to_owned();
        for (i, part) in path.iter().enumerate() {
            match part.as_str() {
                "crate" => at = String::new(),
                "self" => {}
                "super" => at = at.rsplit_once("::").map_or(String::new(), |(up, _)| up.into()),
                name => {
                    // A name that is imported, or a module of this one.
                    let sub = join(&at, name);
                    at = if i == 0 && !self.modules.contains_key(&sub) { name.to_owned() } else { sub };
                }
            }
        }
        at
    }

    /// The types and functions that the documentation shows, by where they are defined.
    fn shown(&self) -> BTreeSet<(Module, String)> {
        let mut shown = BTreeSet::new();
        for module in &self.visible {
            for item in &self.modules[module] {
                if let Some((name, attrs, vis)) = name_of(item) {
                    if is_public(vis) && !is_hidden(attrs) {
                        shown.insert((module.clone(), name));
                    }
                } else if let Item::Use(u) = item
                    && is_public(&u.vis)
                    && !is_hidden(&u.attrs)
                {
                    let mut names = Vec::new();
                    uses(&u.tree, &mut Vec::new(), &mut names);
                    shown.extend(names.iter().filter_map(|(_, alias)| self.resolve(module, alias, 0)));
                }
            }
        }
        shown.retain(|(module, name)| {
            let same = |item: &&Item| name_of(item).is_some_and(|(n, ..)| n == *name);
            self.modules[module].iter().find(same).and_then(name_of).is_some_and(|(_, a, _)| !is_hidden(a))
        });
        shown
    }

    fn things(&self) -> BTreeMap<(Module, String), Thing> {
        let mut things = BTreeMap::new();
        for key in self.shown() {
            let item = self.modules[&key.0].iter().find(|i| name_of(i).is_some_and(|(n, ..)| n == key.1));
            let Some(item) = item else { continue };
            let (_, attrs, _) = name_of(item).unwrap();
            let mut methods = Vec::new();
            if let Item::Trait(t) = item {
                for f in &t.items {
                    if let TraitItem::Fn(f) = f
                        && !is_hidden(&f.attrs)
                    {
                        methods.push((f.sig.ident.to_string(), docs_of(&f.attrs)));
                    }
                }
            }
            things.insert(key, Thing { docs: docs_of(attrs), methods });
        }
        for (module, items) in &self.modules {
            for item in items {
                let Item::Impl(block) = item else { continue };
                let Type::Path(path) = &*block.self_ty else { continue };
                if block.trait_.is_some() || is_hidden(&block.attrs) {
                    continue;
                }
                let name = path.path.segments.last().unwrap().ident.to_string();
                let Some(thing) = self.resolve(module, &name, 0).and_then(|key| things.get_mut(&key)) else {
                    continue;
                };
                for f in &block.items {
                    if let ImplItem::Fn(f) = f
                        && is_public(&f.vis)
                        && !is_hidden(&f.attrs)
                    {
                        thing.methods.push((f.sig.ident.to_string(), docs_of(&f.attrs)));
                    }
                }
            }
        }
        things
    }
}

fn name_of(item: &Item) -> Option<(String, &[Attribute], &Visibility)> {
    match item {
        Item::Struct(i) => Some((i.ident.to_string(), &i.attrs, &i.vis)),
        Item::Enum(i) => Some((i.ident.to_string(), &i.attrs, &i.vis)),
        Item::Trait(i) => Some((i.ident.to_string(), &i.attrs, &i.vis)),
        Item::Fn(i) => Some((i.sig.ident.to_string(), &i.attrs, &i.vis)),
        _ => None,
    }
}

/// The paths that a `use` imports, and by which names.
fn uses(tree: &UseTree, path: &mut Vec<String>, found: &mut Vec<(Vec<String>, String)>) {
    match tree {
        UseTree::Path(p) => {
            path.push(p.ident.to_string());
            uses(&p.tree, path, found);
            path.pop();
        }
        UseTree::Name(n) => {
            let name = n.ident.to_string();
            found.push((path.iter().cloned().chain([name.clone()]).collect(), name));
        }
        UseTree::Rename(r) => {
            let whole = path.iter().cloned().chain([r.ident.to_string()]).collect();
            found.push((whole, r.rename.to_string()));
        }
        UseTree::Group(g) => g.items.iter().for_each(|tree| uses(tree, path, found)),
        UseTree::Glob(_) => {}
    }
}

/// The code blocks of a text that rustdoc runs.
fn tested(docs: &str) -> String {
    let mut code = String::new();
    let mut inside = None;
    for line in docs.lines().map(str::trim) {
        match (line.strip_prefix("```"), inside) {
            (Some(kind), None) => {
                let untested = ["text", "ignore", "no_run", "compile_fail", "console", "toml", "sh", "c"];
                inside = Some(!kind.split(',').any(|word| untested.contains(&word.trim())));
            }
            (Some(_), Some(_)) => inside = None,
            (None, Some(true)) => {
                code.push_str(line);
                code.push('\n');
            }
            _ => {}
        }
    }
    code
}

fn is_used(code: &str, method: &str) -> bool {
    [format!(".{method}("), format!("::{method}("), format!(".{method}::<"), format!("fn {method}(")]
        .iter()
        .any(|call| code.contains(call.as_str()))
}

/// The items whose example a text says that it shares.
fn shared_with(docs: &str) -> impl Iterator<Item = &str> {
    docs.split("example of [`").skip(1).filter_map(|rest| rest.split('`').next())
}

#[test]
fn every_visible_item_has_an_example() {
    let all = Crate::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let things = all.things();
    assert!(
        things.len() > 60,
        "only {} public items were found: is the source read as it should be?",
        things.len()
    );

    // By the last part of its name: examples that can be shared.
    let mut examples: BTreeMap<String, String> = BTreeMap::new();
    for ((_, name), thing) in &things {
        examples.entry(name.clone()).or_default().push_str(&tested(&thing.docs));
        for (method, docs) in &thing.methods {
            examples.entry(format!("{name}::{method}")).or_default().push_str(&tested(docs));
        }
    }
    let mut general = String::new();
    for (module, docs) in &all.docs {
        let code = tested(docs);
        let name = module.rsplit("::").next().filter(|n| !n.is_empty()).unwrap_or("crate");
        examples.entry(name.into()).or_default().push_str(&code);
        general.push_str(&code);
    }
    let shares = |docs: &str, used: &dyn Fn(&str) -> bool| {
        shared_with(docs).any(|of| {
            let parts: Vec<&str> = of.trim_end_matches("()").split("::").collect();
            let last_two = parts[parts.len().saturating_sub(2)..].join("::");
            let code = examples.get(&last_two).or_else(|| examples.get(*parts.last()?));
            code.is_some_and(|code| !code.is_empty() && used(code))
        })
    };

    let mut without = Vec::new();
    let mut methods = 0;
    for ((module, name), thing) in &things {
        let own = tested(&thing.docs);
        if own.is_empty() && !shares(&thing.docs, &|_| true) {
            without.push(join(module, name));
        }
        let of_methods: String = thing.methods.iter().map(|(_, docs)| tested(docs)).collect();
        for (method, docs) in &thing.methods {
            methods += 1;
            let used = [&own, &of_methods, &general].iter().any(|code| is_used(code, method));
            let shared = |docs: &str| shares(docs, &|code| is_used(code, method));
            if !used && tested(docs).is_empty() && !shared(docs) && !shared(&thing.docs) {
                without.push(format!("{}::{method}", join(module, name)));
            }
        }
    }
    assert!(methods > 150, "only {methods} public methods were found");
    assert!(without.is_empty(), "{} without a tested example:\n{}", without.len(), without.join("\n"));
}

#[test]
fn what_is_not_run_is_no_example() {
    assert_eq!(tested("a\n```\nx.f();\n```\nb\n```no_run\ny.g();\n```\n```text\nz\n```\n"), "x.f();\n");
    assert!(
        is_used("x.f();", "f") && is_used("T::f(1)", "f") && !is_used("x.ff()", "f") && !is_used("f", "f")
    );
    assert_eq!(shared_with("Text; see the example of [`a::B`].").collect::<Vec<_>>(), ["a::B"]);
}
