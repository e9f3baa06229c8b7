//! The Python binding: it converts, releases the GIL and raises; everything else is in the other files.

use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyInt, PyIterator, PyList, PyString};

use crate::{Batch, Error, Pair, Splitter, count_words, encode, learn_merges};

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// How often a long computation lets Python see signals and report progress.
const GLANCE: Duration = Duration::from_millis(100);

fn thread_count(threads: Option<usize>) -> PyResult<usize> {
    match threads {
        Some(0) => Err(PyValueError::new_err("threads is 0; it must be at least 1")),
        Some(threads) => Ok(threads),
        None => Ok(available_parallelism().map_or(1, usize::from)),
    }
}

/// The UTF-8 of a Python string, or a sentence about the surrogate in it; `what` names the string.
fn utf8<'py>(text: &Bound<'py, PyString>, what: impl Fn() -> String) -> PyResult<Bound<'py, PyBytes>> {
    text.encode_utf8().map_err(|error| no_utf8(text.py(), &error, &what()))
}

fn no_utf8(py: Python<'_>, error: &PyErr, what: &str) -> PyErr {
    let place = error.value(py).getattr("start").and_then(|start| start.extract::<usize>());
    let place = place.map_or_else(|_| String::new(), |start| format!(" at character {start}"));
    PyValueError::new_err(format!("{what} has a lone surrogate{place}, which is no Unicode text"))
}

fn type_name(object: &Bound<'_, PyAny>) -> String {
    object.get_type().name().map_or_else(|_| "object".into(), |name| name.to_string())
}

/// Merges learned from an iterable of texts, in order, as pairs of ids; merge i makes id 256 + i.
#[pyfunction]
#[pyo3(signature = (texts, vocab_size, *, pattern = None, threads = None, progress = None))]
fn train(
    py: Python<'_>,
    texts: &Bound<'_, PyAny>,
    vocab_size: usize,
    pattern: Option<&str>,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Vec<Pair>> {
    if texts.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err("texts is one str; pass an iterable of str, such as [text]"));
    }
    let splitter = Splitter::new(pattern.unwrap_or(crate::PATTERN))?;
    let threads = thread_count(threads)?;
    let texts = texts.try_iter()?.unbind();
    let report = |py: Python<'_>, phase: &str, done: usize, total: Option<usize>| -> PyResult<()> {
        py.check_signals()?;
        progress.as_ref().map_or(Ok(()), |call| call.call1(py, (phase, done, total)).map(drop))
    };
    py.detach(|| {
        let (mut read, mut bytes) = (0, 0);
        let counts = count_words(&splitter, threads, |batch| {
            Python::attach(|py| {
                let more = fill(texts.bind(py), batch, &mut read)?;
                bytes += batch.size();
                report(py, "read", bytes, None)?;
                Ok::<bool, PyErr>(more)
            })
        })?;
        let mut last = Instant::now();
        learn_merges(counts, vocab_size, |done, total| {
            if done == total || last.elapsed() >= GLANCE {
                last = Instant::now();
                Python::attach(|py| report(py, "merge", done, Some(total)))?;
            }
            Ok::<(), PyErr>(())
        })
    })
}

/// Takes texts until the batch is full; false when there are no more.
fn fill(texts: &Bound<'_, PyIterator>, batch: &mut Batch, read: &mut usize) -> PyResult<bool> {
    let mut texts = texts.clone();
    while batch.size() < Batch::FULL {
        let Some(text) = texts.next() else { return Ok(false) };
        let text = text?;
        let Ok(text) = text.cast::<PyString>() else {
            return Err(PyTypeError::new_err(format!(
                "text {read} is of type {}, not str",
                type_name(&text)
            )));
        };
        let bytes = utf8(text, || format!("text {read}"))?;
        batch.push(std::str::from_utf8(bytes.as_bytes()).expect("Python encodes UTF-8"));
        *read += 1;
    }
    Ok(true)
}

/// What cuts text into words; with `regex`, by the regular expression even for PATTERN.
#[pyclass(frozen, module = "nanochat_bpe", name = "Splitter")]
struct PySplitter(Splitter);

#[pymethods]
impl PySplitter {
    #[new]
    #[pyo3(signature = (pattern = None, *, regex = false))]
    fn new(pattern: Option<&str>, regex: bool) -> PyResult<Self> {
        let pattern = pattern.unwrap_or(crate::PATTERN);
        Ok(Self(if regex { Splitter::regex(pattern)? } else { Splitter::new(pattern)? }))
    }

    /// The words of a text.
    fn split<'t>(&self, text: &'t str) -> PyResult<Vec<&'t str>> {
        let mut words = Vec::new();
        self.0.split(text, |start, end| words.push(&text[start..end]))?;
        Ok(words)
    }
}

/// Merges, ready for use; special tokens take the ids that follow.
#[pyclass(frozen, module = "nanochat_bpe")]
struct Encoder {
    inner: encode::Encoder,
    ints: Vec<Py<PyInt>>, // one Python int per id: making them anew would cost as much as the encoding
}

#[pymethods]
impl Encoder {
    #[new]
    #[pyo3(signature = (merges, specials = Vec::new(), pattern = None))]
    fn new(
        py: Python<'_>,
        merges: Vec<Pair>,
        specials: Vec<String>,
        pattern: Option<&str>,
    ) -> PyResult<Self> {
        let splitter = Splitter::new(pattern.unwrap_or(crate::PATTERN))?;
        let inner = encode::Encoder::new(&merges, &specials, splitter)?;
        let ints = (0..inner.vocab_size()).map(|id| PyInt::new(py, id).unbind()).collect();
        Ok(Self { inner, ints })
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    /// The ids of a text; never one of a special token.
    fn encode<'py>(&self, py: Python<'py>, text: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyList>> {
        let text = text.to_str().map_err(|error| no_utf8(py, &error, "the text"))?;
        let ids = py.detach(|| self.inner.encode(text))?;
        Ok(self.list(py, &ids))
    }

    /// The ids of each text, found on several threads.
    #[pyo3(signature = (texts, threads = None))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyList>> {
        let threads = thread_count(threads)?;
        let texts = backed(texts)?;
        let lists = PyList::empty(py).unbind();
        py.detach(|| {
            self.inner.encode_batch(&texts, threads, |group| {
                Python::attach(|py| {
                    py.check_signals()?;
                    let mut start = 0;
                    for end in group.ends {
                        lists.bind(py).append(self.list(py, &group.ids[start..end]))?;
                        start = end;
                    }
                    Ok::<(), PyErr>(())
                })
            })
        })?;
        Ok(lists.into_bound(py))
    }

    /// The bytes of the ids, joined.
    fn decode<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.inner.decode(&ids)?))
    }

    /// The bytes of every id.
    fn tokens<'py>(&self, py: Python<'py>) -> Vec<Bound<'py, PyBytes>> {
        (0..self.inner.vocab_size()).map(|id| PyBytes::new(py, self.inner.token(id))).collect()
    }
}

impl Encoder {
    fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> Bound<'py, PyList> {
        // SAFETY: the list is new and of the length that is filled, every place once, before anyone else
        // can see it; PyList_SET_ITEM takes over the reference that Py_INCREF adds.
        unsafe {
            let list = ffi::PyList_New(ids.len() as ffi::Py_ssize_t);
            assert!(!list.is_null(), "out of memory");
            for (i, &id) in ids.iter().enumerate() {
                let int = self.ints[id as usize].as_ptr();
                ffi::Py_INCREF(int);
                ffi::PyList_SET_ITEM(list, i as ffi::Py_ssize_t, int);
            }
            Bound::from_owned_ptr(py, list).cast_into_unchecked()
        }
    }
}

/// The texts of an iterable of str, without copying them.
fn backed(texts: &Bound<'_, PyAny>) -> PyResult<Vec<PyBackedStr>> {
    if texts.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err("texts is one str; pass a list of str"));
    }
    let mut out = Vec::new();
    for (index, text) in texts.try_iter()?.enumerate() {
        let text = text?;
        let Ok(text) = text.cast::<PyString>() else {
            return Err(PyTypeError::new_err(format!(
                "text {index} is of type {}, not str",
                type_name(&text)
            )));
        };
        let backed = PyBackedStr::try_from(text.clone());
        out.push(backed.map_err(|error| no_utf8(text.py(), &error, &format!("text {index}")))?);
    }
    Ok(out)
}

#[pymodule]
fn nanochat_bpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("PATTERN", crate::PATTERN)?;
    module.add_function(wrap_pyfunction!(train, module)?)?;
    module.add_class::<PySplitter>()?;
    module.add_class::<Encoder>()
}
