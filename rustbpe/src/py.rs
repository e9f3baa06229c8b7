use pyo3::prelude::*;
#[pymodule]
fn nanochat_bpe(_m: &Bound<'_, PyModule>) -> PyResult<()> {
    Ok(())
}
