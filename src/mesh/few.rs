//! Small collections as the mesh has them by the ten thousand: nothing is allocated for what is not there.

use std::borrow::Borrow;
use std::sync::Arc;

/// A list that mostly holds one item, in the order they came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Few<T> {
    #[default]
    None,
    One(T),
    Many(Vec<T>),
}

impl<T> Few<T> {
    fn as_slice(&self) -> &[T] {
        match self {
            Self::None => &[],
            Self::One(item) => std::slice::from_ref(item),
            Self::Many(items) => items,
        }
    }

    /// Appends an item.
    pub fn push(&mut self, item: T) {
        *self = match std::mem::take(self) {
            Self::None => Self::One(item),
            Self::One(first) => Self::Many(vec![first, item]),
            Self::Many(mut items) => {
                items.push(item);
                Self::Many(items)
            }
        };
    }

    /// Keeps the items that `keep` holds for.
    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        *self = match std::mem::take(self) {
            Self::One(item) if keep(&item) => Self::One(item),
            Self::None | Self::One(_) => Self::None,
            Self::Many(mut items) => {
                items.retain(keep);
                match items.len() {
                    0 | 1 => items.pop().map_or(Self::None, Self::One),
                    _ => Self::Many(items),
                }
            }
        };
    }
}

impl<T> From<Vec<T>> for Few<T> {
    fn from(items: Vec<T>) -> Self {
        items.into_iter().collect()
    }
}

impl<T> FromIterator<T> for Few<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        let mut few = Self::None;
        items.into_iter().for_each(|item| few.push(item));
        few
    }
}

impl<T> std::ops::Deref for Few<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.as_slice()
    }
}

impl<'a, T> IntoIterator for &'a Few<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// A sorted map of a handful of entries, in one allocation that clones share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SmallMap<K, V>(Arc<[(K, V)]>);

impl<K, V> Default for SmallMap<K, V> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Ord, V> SmallMap<K, V> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let at = self.0.binary_search_by(|(k, _)| k.borrow().cmp(key)).ok()?;
        Some(&self.0[at].1)
    }

    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.0.iter().map(|(key, _)| key)
    }

    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.0.iter().map(|(_, value)| value)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.0.iter().map(|(key, value)| (key, value))
    }

    /// Adds an entry or replaces the one of the same key; the whole map is made anew.
    pub fn insert(&mut self, key: K, value: V)
    where
        K: Clone,
        V: Clone,
    {
        let entries = self.0.iter().cloned();
        *self = entries.chain([(key, value)]).collect();
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

impl<K: Ord, V> FromIterator<(K, V)> for SmallMap<K, V> {
    /// Of several entries with one key the last stays.
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut entries: Vec<_> = entries.into_iter().collect();
        entries.sort_by(|(a, _), (b, _)| a.cmp(b));
        entries.dedup_by(|later, kept| {
            let same = later.0 == kept.0;
            if same {
                std::mem::swap(later, kept);
            }
            same
        });
        Self(entries.into())
    }
}

impl<K: Ord, V, const N: usize> From<[(K, V); N]> for SmallMap<K, V> {
    fn from(entries: [(K, V); N]) -> Self {
        entries.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_grows_and_shrinks() {
        let mut few = Few::default();
        for item in [3, 1, 2] {
            few.push(item);
        }
        assert_eq!(few.as_slice(), [3, 1, 2]);
        few.retain(|item| *item == 1);
        assert_eq!(few, Few::One(1));
        few.retain(|_| false);
        assert!(few.is_empty());
    }

    #[test]
    fn a_map_is_sorted_and_the_last_of_a_key_stays() {
        let mut map: SmallMap<u16, u16> = [(2, 20), (1, 10), (2, 21)].into();
        assert_eq!(map.iter().collect::<Vec<_>>(), [(&1, &10), (&2, &21)]);
        map.insert(1, 11);
        map.insert(0, 1);
        assert_eq!((map.get(&1), map.get(&3)), (Some(&11), None));
        assert_eq!(map.keys().count(), 3);
    }
}
