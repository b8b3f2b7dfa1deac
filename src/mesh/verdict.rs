//! The policies that apply to a workload, and their verdict.

use super::snapshot::Mesh;
use super::workload::Workload;
use crate::policy::evaluate::{Context, Verdict, evaluate};
use crate::policy::model::Scope;

impl Mesh {
    /// What policy says of a flow to a workload. Fails closed: while policies are missing, nobody passes.
    pub fn verdict(&self, workload: &Workload, context: &Context<'_>) -> Verdict {
        if !self.policies_synced() {
            return Verdict::NotSynced;
        }
        let mut policies = Vec::new();
        for key in &workload.authorization_policies {
            match self.policy(key) {
                Some(policy) => policies.push(policy),
                // The record that still names it is about to be replaced.
                None if self.is_removed_policy(key) => {}
                None => return Verdict::Missing(key.to_string()),
            }
        }
        // A namespace policy that names no namespace shares its place in the index with those for everyone.
        let of = |namespace: &str, scope: Scope| {
            self.policies_for_namespace(namespace)
                .filter(move |policy| policy.scope == scope)
        };
        policies.extend(of("", Scope::Global));
        policies.extend(of(&workload.namespace, Scope::Namespace));
        evaluate(&policies, context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::Store;
    use crate::mesh::testing::pod;
    use crate::policy::Policy;
    use crate::policy::model::Action;

    fn denial(key: &str, scope: Scope) -> Policy {
        let (namespace, name) = key.split_once('/').unwrap();
        Policy {
            key: key.into(),
            name: name.into(),
            namespace: namespace.into(),
            scope,
            action: Action::Deny,
            rules: vec![vec![]],
            dry_run: false,
        }
    }

    fn refusal(store: &Store, workload: &Workload) -> Option<String> {
        let address = "10.0.0.1:80".parse().unwrap();
        store
            .snapshot()
            .verdict(
                workload,
                &Context {
                    identity: None,
                    src: address,
                    dst: address,
                },
            )
            .refusal()
    }

    #[test]
    fn a_policy_that_was_taken_back_is_not_waited_for() {
        let mut store = Store::new("");
        store.set_policies_synced();
        let mut workload = pod("a", "x", "10.0.0.1");
        workload.authorization_policies = vec!["a/p".into()];
        store.apply_policies(vec![denial("a/p", Scope::WorkloadSelector)], &[]);
        assert_eq!(
            refusal(&store, &workload).as_deref(),
            Some("explicitly denied by: a/p")
        );
        store.apply_policies(vec![], &["a/p".to_string()]);
        assert_eq!(refusal(&store, &workload), None);
        store.apply_policies(vec![denial("a/p", Scope::WorkloadSelector)], &[]);
        assert!(refusal(&store, &workload).is_some());
    }

    #[test]
    fn nobody_passes_before_the_policies_have_arrived() {
        let mut store = Store::new("");
        let mut workload = pod("a", "x", "10.0.0.1");
        assert_eq!(
            refusal(&store, &workload).as_deref(),
            Some("policies have not arrived from the control plane yet")
        );
        store.set_policies_synced();
        assert_eq!(refusal(&store, &workload), None);
        workload.authorization_policies = vec!["a/missing".into()];
        assert_eq!(
            refusal(&store, &workload).as_deref(),
            Some("policy a/missing has not arrived from the control plane yet")
        );
    }

    #[test]
    fn policies_reach_everyone_their_namespace_or_whoever_names_them() {
        let workload = pod("a", "x", "10.0.0.1");
        let mut selected = workload.clone();
        selected.authorization_policies = vec!["a/p".into()];
        let cases = [
            ("root/p", Scope::Global, &workload, true),
            ("a/p", Scope::Namespace, &workload, true),
            ("b/p", Scope::Namespace, &workload, false),
            ("a/p", Scope::WorkloadSelector, &workload, false),
            ("a/p", Scope::WorkloadSelector, &selected, true),
            ("/p", Scope::Namespace, &workload, false),
        ];
        for (key, scope, workload, denied) in cases {
            let mut store = Store::new("");
            store.set_policies_synced();
            store.apply_policies(vec![denial(key, scope)], &[]);
            assert_eq!(
                refusal(&store, workload).is_some(),
                denied,
                "{key} {scope:?}"
            );
        }
    }
}
