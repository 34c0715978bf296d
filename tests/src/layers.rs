//! Checks the layers of each crate in `src/`, as the table on its root page lists them, lowest
//! first: a module imports only modules of its own layer or of lower layers, and no modules import
//! each other in a circle. Tests may import any module.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use quote::ToTokens;
use syn::punctuated::Punctuated;
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemMod, Macro, Meta, Token, UseTree};

/// A module, as its path below the crate without `crate`; empty for the root page.
type Module = Vec<String>;

/// A crate: its layers, and its modules, each with the modules that it imports.
struct Crate {
    imports: BTreeMap<Module, BTreeSet<Module>>,
    layers: Vec<String>,
}

impl Crate {
    fn read(root_page: &Path) -> Self {
        let folder = root_page.parent().unwrap();
        let mut sources = BTreeMap::new();
        read_module(root_page, folder, Vec::new(), &mut sources);
        let modules: BTreeSet<Module> = sources.keys().cloned().collect();
        let imports = sources.iter().map(|(module, items)| {
            let mut paths = Paths { module, modules: &modules, found: BTreeSet::new() };
            items.iter().for_each(|item| paths.visit_item(item));
            let found = paths.found.into_iter().filter(|found| found != module);
            (module.clone(), found.collect())
        });
        let text = std::fs::read_to_string(root_page).unwrap();
        let rows = text.lines().filter_map(|line| line.strip_prefix("//! | "));
        let names = rows.filter_map(|row| Some(row.split('`').nth(1)?.to_owned()));
        Self { imports: imports.collect(), layers: names.collect() }
    }

    /// Returns what is wrong with the crate, one line per fault.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let height = |module: &Module| self.layers.iter().position(|layer| Some(layer) == module.first());
        let tops: BTreeSet<&String> = self.imports.keys().filter_map(|module| module.first()).collect();
        let listed: BTreeSet<&String> = self.layers.iter().collect();
        if tops != listed {
            faults.push(format!("the root page lists {listed:?}; the modules are {tops:?}"));
        }
        for (module, imports) in self.imports.iter().filter(|(module, _)| !module.is_empty()) {
            for import in imports {
                if import.is_empty() {
                    faults.push(format!("{} imports from the root page", module.join("::")));
                } else if height(import) > height(module) {
                    faults.push(format!(
                        "{} imports {}, which lies higher",
                        module.join("::"),
                        import.join("::")
                    ));
                }
            }
        }
        for module in self.imports.keys().filter(|module| !module.is_empty()) {
            if let Some(circle) = self.circle(module) {
                faults.push(format!("a circle: {}", circle.join(" -> ")));
            }
        }
        faults
    }

    /// Returns a chain of imports from a module back to itself.
    fn circle(&self, from: &Module) -> Option<Vec<String>> {
        let mut ways = vec![vec![from]];
        let mut seen = BTreeSet::new();
        while let Some(way) = ways.pop() {
            for next in way.last().and_then(|last| self.imports.get(*last)).into_iter().flatten() {
                let mut way = way.clone();
                way.push(next);
                if next == from {
                    return Some(way.iter().map(|module| module.join("::")).collect());
                }
                if seen.insert(next) {
                    ways.push(way);
                }
            }
        }
        None
    }
}

/// Returns whether an item is compiled for tests alone.
fn is_for_tests(attributes: &[Attribute]) -> bool {
    let mut cfgs = attributes.iter().filter(|attribute| attribute.path().is_ident("cfg"));
    cfgs.any(|cfg| cfg.parse_args().is_ok_and(|condition: Meta| asks_for_test(&condition)))
}

/// Returns whether a condition holds in tests alone: `test`, the feature `testing`, and what `all`
/// and `any` make of them.
fn asks_for_test(condition: &Meta) -> bool {
    match condition {
        Meta::Path(path) => path.is_ident("test"),
        Meta::NameValue(pair) => {
            pair.path.is_ident("feature") && pair.value.to_token_stream().to_string() == "\"testing\""
        }
        Meta::List(list) => {
            let parts = list.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated);
            parts.is_ok_and(|parts| match () {
                () if list.path.is_ident("all") => parts.iter().any(asks_for_test),
                () if list.path.is_ident("any") => parts.iter().all(asks_for_test),
                () => false,
            })
        }
    }
}

/// Reads a module's file and, recursively, the files of the modules that it declares.
fn read_module(file: &Path, folder: &Path, module: Module, into: &mut BTreeMap<Module, Vec<Item>>) {
    let text = std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let mut items = Vec::new();
    for item in parsed.items {
        match item {
            Item::Mod(ItemMod { attrs, ident, content: None, .. }) => {
                if !is_for_tests(&attrs) {
                    let mut child = module.clone();
                    child.push(ident.to_string());
                    let (file, folder) = file_of(folder, &ident.to_string());
                    read_module(&file, &folder, child, into);
                }
            }
            other => items.push(other),
        }
    }
    into.insert(module, items);
}

fn file_of(folder: &Path, name: &str) -> (PathBuf, PathBuf) {
    let inner = folder.join(name);
    let flat = folder.join(format!("{name}.rs"));
    if flat.exists() { (flat, inner) } else { (inner.join("mod.rs"), inner) }
}

/// Collects the modules that a module's code names.
struct Paths<'a> {
    module: &'a Module,
    modules: &'a BTreeSet<Module>,
    found: BTreeSet<Module>,
}

impl Paths<'_> {
    /// Notes the module that a path leads into, if it is a module of the crate.
    fn note(&mut self, segments: &[String]) {
        let mut rest = segments;
        let mut path: Module = match rest.first().map(String::as_str) {
            Some("crate") => Vec::new(),
            Some("self" | "super") => self.module.clone(),
            Some(first) => {
                // The path may start with a module that this one declares.
                let mut child = self.module.clone();
                child.push(first.to_owned());
                if !self.modules.contains(&child) {
                    return;
                }
                self.module.clone()
            }
            None => return,
        };
        while let Some((first, after)) = rest.split_first() {
            match first.as_str() {
                "crate" | "self" => {}
                "super" => drop(path.pop()),
                name => {
                    path.push(name.to_owned());
                    if !self.modules.contains(&path) {
                        path.pop();
                        break;
                    }
                }
            }
            rest = after;
        }
        self.found.insert(path);
    }

    fn note_tree(&mut self, tree: &UseTree, before: &mut Vec<String>) {
        match tree {
            UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.note_tree(&path.tree, before);
                before.pop();
            }
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.note_tree(tree, before)),
            UseTree::Name(name) => self.note_name(&name.ident.to_string(), before),
            UseTree::Rename(rename) => self.note_name(&rename.ident.to_string(), before),
            UseTree::Glob(_) => self.note(before),
        }
    }

    fn note_name(&mut self, name: &str, before: &[String]) {
        let mut path = before.to_vec();
        path.push(name.to_owned());
        self.note(&path);
    }

    /// Notes the paths in a macro's arguments. The arguments are not parsed: the identifiers after
    /// `crate` are taken for a path.
    fn note_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        for token in tokens {
            match token {
                TokenTree::Ident(ident) if ident == "crate" || ident == "super" || !path.is_empty() => {
                    path.push(ident.to_string());
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => {}
                // As serde has it: `serialize_with = "crate::..."`.
                TokenTree::Literal(literal) if literal.to_string().starts_with("\"crate::") => {
                    let text = literal.to_string();
                    let text = text.trim_matches('"').split("::");
                    self.note(&text.map(str::to_owned).collect::<Vec<_>>());
                }
                other => {
                    self.note(&std::mem::take(&mut path));
                    if let TokenTree::Group(group) = other {
                        self.note_tokens(group.stream());
                    }
                }
            }
        }
        self.note(&path);
    }
}

impl<'ast> Visit<'ast> for Paths<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        let attributes = match item {
            Item::Const(item) => &item.attrs,
            Item::Enum(item) => &item.attrs,
            Item::Fn(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            Item::Macro(item) => &item.attrs,
            Item::Mod(item) => &item.attrs,
            Item::Static(item) => &item.attrs,
            Item::Struct(item) => &item.attrs,
            Item::Trait(item) => &item.attrs,
            Item::Type(item) => &item.attrs,
            Item::Use(item) => &item.attrs,
            _ => return visit::visit_item(self, item),
        };
        if !is_for_tests(attributes) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if !is_for_tests(&function.attrs) {
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if item.leading_colon.is_none() {
            self.note_tree(&item.tree, &mut Vec::new());
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() && path.segments.len() > 1 {
            let segments: Vec<String> =
                path.segments.iter().map(|segment| segment.ident.to_string()).collect();
            self.note(&segments);
        }
        visit::visit_path(self, path);
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        if let Meta::List(list) = &attribute.meta {
            self.note_tokens(list.tokens.clone());
        }
    }

    fn visit_macro(&mut self, macro_call: &'ast Macro) {
        self.note_tokens(macro_call.tokens.clone());
        visit::visit_macro(self, macro_call);
    }
}

fn faults_of(root_page: &str) -> Vec<String> {
    Crate::read(&crate::root().join(root_page)).faults()
}

#[test]
fn the_rules_have_no_circle_and_import_downwards() {
    assert_eq!(faults_of("src/stats/lib.rs"), [""; 0]);
}

#[test]
fn the_filter_has_no_circle_and_imports_downwards() {
    assert_eq!(faults_of("src/filter/lib.rs"), [""; 0]);
}

#[test]
fn the_stats_server_has_no_circle_and_imports_downwards() {
    assert_eq!(faults_of("src/statserver/main.rs"), [""; 0]);
}

/// Returns the faults of a crate that is made of these files, in a temporary folder.
fn faults_in(files: &[(&str, &str)]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let file = folder.path().join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, text).unwrap();
    }
    Crate::read(&folder.path().join("lib.rs")).faults()
}

const PAGE: &str = "//! | `low` | x |\n//! | [`high`] | y |\npub mod high;\npub mod low;\npub use low::A;\n";

#[test]
fn imports_downwards_are_no_fault_and_tests_may_look_anywhere() {
    let high = "use crate::low::{self, A};\nuse std::fmt;\nfn f() -> A { println!(\"{}\", low::a()); }";
    let low = "pub struct A;\n#[cfg(test)]\nmod tests { use crate::high::f; }\n#[cfg(test)]\nfn g() { crate::high::f(); }\n#[cfg(any(test, feature = \"testing\"))]\nenum E { F(crate::high::F) }";
    assert_eq!(faults_in(&[("lib.rs", PAGE), ("high.rs", high), ("low.rs", low)]), [""; 0]);
}

#[test]
fn a_circle_an_import_upwards_and_one_from_the_root_page_are_found_wherever_they_hide() {
    let upwards = [
        "low imports high, which lies higher",
        "a circle: high -> low -> high",
        "a circle: low -> high -> low",
    ];
    for low in [
        "use crate::high::F;",
        "use crate::{high};",
        "use super::high::F;",
        "fn f() { super::high::f() }",
        "fn f() { println!(\"{}\", crate::high::f()) }",
        "fn f(x: Vec<crate::high::F>) {}",
        "impl crate::high::T for u8 {}",
        "fn f() { println!(\"{}\", super::high::f()) }",
        "#[derive(A)]\nstruct S { #[a(with = crate::high::f)] b: u8 }",
        "#[derive(A)]\nstruct S { #[a(with = \"crate::high::f\")] b: u8 }",
        "#[cfg(any(test, unix))]\nuse crate::high::F;",
    ] {
        let faults = faults_in(&[("lib.rs", PAGE), ("high.rs", "use crate::low::A;"), ("low.rs", low)]);
        assert_eq!(faults, upwards, "{low}");
    }
    let shipped =
        "#[cfg(not(test))]\nfn f() { crate::high::f() }\n#[cfg(any(unix, not(test)))]\nuse crate::high;";
    assert_eq!(
        faults_in(&[("lib.rs", PAGE), ("high.rs", "use crate::low::A;"), ("low.rs", shipped)]),
        upwards
    );
    let root = faults_in(&[("lib.rs", PAGE), ("high.rs", "use crate::A;"), ("low.rs", "")]);
    assert_eq!(root, ["high imports from the root page"]);
    let inner = [
        ("lib.rs", PAGE),
        ("high.rs", ""),
        ("low/mod.rs", "mod a; mod b;"),
        ("low/a.rs", "use super::b::B;"),
        ("low/b.rs", "use crate::low::a::A;"),
    ];
    assert_eq!(
        faults_in(&inner),
        ["a circle: low::a -> low::b -> low::a", "a circle: low::b -> low::a -> low::b"]
    );
    let unlisted = faults_in(&[("lib.rs", "pub mod low;"), ("low.rs", "")]);
    assert_eq!(unlisted, [r#"the root page lists {}; the modules are {"low"}"#]);
}
