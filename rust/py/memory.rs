//! `MemoryStore`: the values that tasks of one process share.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyIterator, PyList, PyTuple, PyType};
use pyo3::{PyTraverseError, PyVisit};

use super::convert::is_hashable;
use super::errors::{ConfigurationError, KeyNotFoundError, StoreTypeError, show};

/// Keys and values; every operation is one step of the interpreter, values are handed out as the objects they are.
#[pyclass(frozen, module = "cano", mapping, weakref, subclass)]
pub(super) struct MemoryStore {
    values: Py<PyDict>,
}

impl MemoryStore {
    fn missing(key: &Bound<'_, PyAny>) -> PyErr {
        match show(key) {
            Ok(text) => KeyNotFoundError::new_err(format!("no value under key {text}")),
            Err(error) => error,
        }
    }

    fn wrong_type(key: &Bound<'_, PyAny>, wanted: &str, found: &Bound<'_, PyAny>) -> PyErr {
        match (show(key), found.get_type().qualname()) {
            (Ok(key), Ok(class)) => {
                StoreTypeError::new_err(format!("the value under key {key} must be {wanted}, it is a {class}"))
            }
            (Err(error), _) | (_, Err(error)) => error,
        }
    }
}

/// The error of a dict operation, unless it is that the key cannot be hashed: that is ours to say.
fn refused(key: &Bound<'_, PyAny>, error: PyErr) -> PyErr {
    match (is_hashable(key), key.get_type().qualname()) {
        (Ok(false), Ok(class)) => ConfigurationError::new_err(format!("key must be hashable, got a {class}")),
        _ => error,
    }
}

#[pymethods]
impl MemoryStore {
    #[new]
    fn new(py: Python<'_>) -> Self {
        Self { values: PyDict::new(py).unbind() }
    }

    fn put(&self, py: Python<'_>, key: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let values = self.values.bind(py);
        values.set_item(key, value).map_err(|error| refused(key, error))
    }

    #[pyo3(signature = (key, type_=None))]
    fn get<'py>(
        &self,
        py: Python<'py>,
        key: &Bound<'py, PyAny>,
        type_: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let found = self.values.bind(py).get_item(key).map_err(|error| refused(key, error))?;
        let value = found.ok_or_else(|| Self::missing(key))?;
        let Some(class) = type_ else {
            return Ok(value);
        };
        match value.is_instance(class) {
            Ok(true) => Ok(value),
            Ok(false) => Err(Self::wrong_type(key, &format!("a {}", class_name(class)?), &value)),
            Err(_) => Err(ConfigurationError::new_err(format!(
                "type_ must be a class or a tuple of classes, got {}",
                show(class)?
            ))),
        }
    }

    fn get_or<'py>(
        &self,
        py: Python<'py>,
        key: &Bound<'py, PyAny>,
        default: Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let found = self.values.bind(py).get_item(key).map_err(|error| refused(key, error))?;
        Ok(found.unwrap_or(default))
    }

    fn remove(&self, py: Python<'_>, key: &Bound<'_, PyAny>) -> PyResult<()> {
        let values = self.values.bind(py);
        let removed = values.call_method1(intern!(py, "pop"), (key, py.None()));
        removed.map(drop).map_err(|error| refused(key, error))
    }

    fn append(&self, py: Python<'_>, key: &Bound<'_, PyAny>, item: &Bound<'_, PyAny>) -> PyResult<()> {
        let values = self.values.bind(py);
        let found = values
            .call_method1(intern!(py, "setdefault"), (key, PyList::empty(py)))
            .map_err(|error| refused(key, error))?;
        match found.cast::<PyList>() {
            Ok(list) => list.append(item),
            Err(_) => Err(Self::wrong_type(key, "a list to append to", &found)),
        }
    }

    fn contains_key(&self, py: Python<'_>, key: &Bound<'_, PyAny>) -> PyResult<bool> {
        self.values.bind(py).contains(key).map_err(|error| refused(key, error))
    }

    fn keys<'py>(&self, py: Python<'py>) -> Bound<'py, PyList> {
        self.values.bind(py).keys()
    }

    fn clear(&self, py: Python<'_>) {
        self.values.bind(py).clear();
    }

    fn __len__(&self, py: Python<'_>) -> usize {
        self.values.bind(py).len()
    }

    fn __contains__(&self, py: Python<'_>, key: &Bound<'_, PyAny>) -> PyResult<bool> {
        self.contains_key(py, key)
    }

    /// Iterates over a copy of the keys, so that a task may write while another one looks.
    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        self.keys(py).try_iter()
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!("<MemoryStore with {} keys>", self.__len__(py))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.values)
    }
}

/// "int", or "int or str" for a tuple.
fn class_name(class: &Bound<'_, PyAny>) -> PyResult<String> {
    if let Ok(classes) = class.cast::<PyTuple>() {
        let names: Vec<String> = classes.iter().map(|one| class_name(&one)).collect::<PyResult<_>>()?;
        return Ok(names.join(" or "));
    }
    match class.cast::<PyType>() {
        Ok(class) => Ok(class.qualname()?.to_string()),
        Err(_) => show(class),
    }
}
