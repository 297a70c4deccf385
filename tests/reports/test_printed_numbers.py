"""Every number of the tables of SiDA, SPI-GAN, GDD and Diffusion2GAN as they print it, and what makes each row."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from d2o.errors import UserError
from d2o.recipes.find import find_recipe, recipe_names
from d2o.recipes.load import load_recipe
from d2o.recipes.sweep import plan_sweep
from d2o.recipes.table_runs import table_members
from d2o.reports.paper_tables import PaperRow, absent, find_table, load_table, table_names
from d2o.settings.recipe_names import is_shipped
from tests.recipes.test_heads import COMMANDS, commands

OURS = [name for name in table_names() if name.startswith(("sida", "spi_gan", "d2g", "gdd"))]


def rows(table: str) -> dict[str, PaperRow]:
    return {row.name: row for row in load_table(table).rows}


def numbers(table: str, key: str) -> list[float | tuple[float, float] | None]:
    """What the table prints under a key, row after row; with its deviation where it has one."""
    found = (row.printed(key) for row in load_table(table).rows)
    return [None if pair is None else pair if pair[1] is not None else pair[0] for pair in found]


# ---- the numbers -----------------------------------------------------------------------------------------------------

NONE = [None]
EDM2_FID = [3.53, 2.56, 2.25, 2.06, 1.96, 1.91, 2.91, 2.23, 2.01, 1.88, 1.85, 1.81]
SCT_FID = [10.13, 5.84, 5.15, 4.33, 4.29, 9.86, 5.53, 4.65, 3.73, 3.76]
SCD_FID = [3.07, 2.75, 2.55, 2.40, 2.28, 2.50, 2.26, 2.04, 1.93, 1.88]
SID_FID = [(3.353, 0.041), (2.707, 0.054), (2.060, 0.038), (1.907, 0.016), (2.005, 0.024)]
SIDA_FID = [(2.228, 0.037), (1.756, 0.023), (1.546, 0.023), (1.501, 0.024), (1.449, 0.033)]

SIDA = {
    "sida_table1": {
        "nfe": [35, 1000, 100, 48, 1000, 4000, 15, 100, 35, *[1] * 13],
        "fid": [1.97, 3.17, 4.16, 2.65, 4.00, 2.90, 4.17, 2.83, 1.88, (2.92, 0.05), 2.54, 2.51, 4.53, 2.71, 3.77]
        + [1.98, 1.54, (2.028, 0.020), (1.923, 0.017), (1.516, 0.010), (1.499, 0.012), (1.519, 0.009)],
        "is": [9.68, (9.46, 0.11), *NONE * 5, 9.34, 9.84, (9.83, 0.04), None, 9.76, 9.89, (9.86, 0.04), None, None]
        + [10.10, (10.017, 0.047), (9.980, 0.042), (10.323, 0.048), (10.188, 0.035), (10.252, 0.027)],
    },
    "sida_table2": {
        "nfe": [35, *[1] * 16],
        "fid": [1.79, 14.73, (3.49, 0.17), (2.42, 0.04), 6.25, 4.19, 2.27, 2.66, 3.82, 5.58, 1.73, 1.44]
        + [(1.932, 0.019), (1.710, 0.011), (1.436, 0.009), (1.403, 0.010), (1.396, 0.014)],
    },
    "sida_table3": {
        "nfe": [511, 79, 1000, 250, 250, 50, 15, 50, 250, 250, 1, 1, 2, 8, 1, 1, 1, 2, 1, 2, 1, 1, 2, *[1] * 9],
        "fid": [1.36, 2.64, 1.23, 11.00, 2.07, 17.52, 15.49, 4.26, 2.91, 2.16, 4.02, 3.25, 8.95, 2.05, 16.3, 9.49]
        + [7.83, 4.70, 5.57, 4.97, 2.62, 1.92, 1.73, 1.16, 2.2, 1.51, 1.28]
        + [(2.022, 0.031), (1.524, 0.009), (1.353, 0.025), (1.114, 0.019), (1.110, 0.018)],
    },
    "sida_table3_pr": {
        "nfe": [79, 250, 250, 1, 1, 2, 1, 1, 2, 1, 2, *[1] * 7],
        "precision": [0.71, 0.67, 0.74, 0.70, 0.72, 0.63, 0.68, None, 0.69, None, None, 0.75, None]
        + [0.73, 0.74, 0.74, 0.75, 0.75],
        "recall": [0.67, 0.58, 0.63, 0.63, 0.63, 0.65, 0.36, 0.61, 0.64, 0.57, 0.57, 0.60, 0.59]
        + [0.63, 0.63, 0.63, 0.62, 0.62],
    },
    "sida_table4": {
        "nfe": [*[63] * 12, *[1] * 5, *[2] * 5, *[1] * 5, *[2] * 5, *[1] * 14],
        "fid": EDM2_FID
        + SCT_FID
        + SCD_FID
        + SID_FID
        + SIDA_FID
        + [(2.156, 0.028), (1.669, 0.019), (1.488, 0.038), (1.465, 0.028)],
    },
    "sida_table5": {
        "nfe": [79, 50, 50, *[1] * 6],
        "fid": [2.39, 2.60, 3.11, 9.00, (1.710, 0.018), (1.550, 0.017), (1.134, 0.012), (1.040, 0.011)]
        + [(1.109, 0.015)],
    },
    "sida_table6": {
        "nfe": [79, *[1] * 5],
        "fid": [1.96, (1.628, 0.017), (1.711, 0.020), (1.345, 0.015), (1.276, 0.010), (1.366, 0.018)],
    },
    "sida_table7": {
        "nfe": [*[63] * 12, *[1] * 14],
        "fd-dinov2": [103.39, 68.64, 58.44, 52.25, 45.96, 42.84, 79.94, 52.32, 41.98, 38.20, 35.67, 33.09]
        + [(91.75, 0.55), (65.08, 0.32), (55.92, 0.25), (56.25, 0.40), (55.87, 0.21)]
        + [(93.67, 0.40), (68.76, 0.45), (53.40, 0.60), (48.47, 0.45), (46.47, 0.27)]
        + [(86.96, 0.32), (62.19, 0.36), (49.01, 0.54), (45.92, 0.33)],
    },
    "sida_table8": {
        "batch": [256, 8192, 512, 512] * 2,
        "gigabytes": [13.0, 46.7, 31.1, 31.1] * 2,
        "seconds_per_kimg": [3.3, 3.1, 1.1, 1.1, 3.6, 3.5, 1.2, 1.2],
        "hours_per_10mimg": [9.2, 8.6, 3.1, 3.1, 10.0, 9.7, 3.3, 3.3],
        "days_per_100mimg": [3.8, 3.6, 1.3, 1.3, 4.2, 4.1, 1.4, 1.4],
    },
    # the figures are curves: their numbers are those of the tables (Fig. 2: Table 1; 3: 1, 2 and 3; 4: 4; 5: 5 and 6)
    "sida_fig2": {"nfe": [1, *NONE * 8], "fid": [(1.923, 0.017), *NONE * 8], "is": [(9.980, 0.042), *NONE * 8]},
    "sida_fig3a": {
        "nfe": [35, *[1] * 7],
        "fid": [1.97, 4.53, 3.77, (2.028, 0.020), (1.923, 0.017), (1.516, 0.010), (1.499, 0.012), (1.519, 0.009)],
    },
    "sida_fig3b": {
        "nfe": [35, *[1] * 7],
        "fid": [1.79, 4.19, 2.66, (1.932, 0.019), (1.710, 0.011), (1.436, 0.009), (1.403, 0.010), (1.396, 0.014)],
    },
    "sida_fig3c": {
        "nfe": [79, *[1] * 7],
        "fid": [2.64, 5.57, 2.62, (2.022, 0.031), (1.524, 0.009), (1.353, 0.025), (1.114, 0.019), (1.110, 0.018)],
    },
    "sida_fig4": {
        "nfe": [*[63] * 12, *[1] * 5, *[2] * 5, *[1] * 10, *NONE * 2],  # XXL of SiD and SiDA: no numbers
        "fid": EDM2_FID + SCD_FID + SID_FID + SIDA_FID + NONE * 2,
    },
    "sida_fig5a": {
        "nfe": [79, *[1] * 5],
        "fid": [2.39, (1.710, 0.018), (1.550, 0.017), (1.134, 0.012), (1.040, 0.011), (1.109, 0.015)],
    },
    "sida_fig5b": {
        "nfe": [79, *[1] * 5],
        "fid": [1.96, (1.628, 0.017), (1.711, 0.020), (1.345, 0.015), (1.276, 0.010), (1.366, 0.018)],
    },
}

SPI_GAN = {
    "spi_gan_table1": {
        "fid": [3.09, 3.75, 3.21, 25.3, 6.10, 2.87, 2.20, 2.41, 3.08, 2.10, 4.67, 3.41, 9.58, 2.90, 4.00, 2.33, 7.34]
        + [2.44, 9.36, 21.7, 9.62, 12.4, 9.26, 8.32, 2.92, 5.79, 48.9, 65.9, 23.5, 40.6, 12.2],
        "is": [10.3, 9.63, 9.46, 8.87, None, None, 9.89, 9.68, 9.83, 9.87, 8.78, 8.98, 8.30, None, None, 10.1, 8.56]
        + [None, 8.36, 8.22, 9.35, 8.60, 9.02, 9.18, 9.83, 9.40, 3.92, 4.60, 7.18, 6.02, 8.43],
        "recall": [0.66, 0.57, 0.57, *NONE * 3, 0.59, 0.59, 0.57, 0.61, 0.53, 0.56, *NONE * 6, 0.51, 0.44, 0.48, 0.46]
        + [None, 0.41, 0.49, 0.42, None, None, 0.51, None, 0.53],  # less TransGAN's two doubtful cells, as nfe
        "nfe": [1, 4, 1000, 1000, 1000, None, 2000, 2000, 140, 147, 50, 50, 180, 4000, 1000, 2000, 1000, 180, 1, 1, 25]
        + [1, None, 1, 1, 1, 1, 1024, 1, 60, 16],
        "seconds": [0.04, 0.21, 80.5, 107.9, None, None, 423.2, 421.5, 50.9, 44.5, 4.01, 4.01, *NONE * 8, 1.98]
        + [None, None, 0.04, 0.04, 0.04, None, None, 0.36, None, 8.79],
    },
    "spi_gan_table2": {"fid-pytorch": [6.62, 7.64, 7.23, 7.22, 7.16, 29.7, 20.4, 24.8, 8.03, 19.2, 10.2, 15.8]},
    "spi_gan_table3": {"fid-pytorch": [6.03, 5.25, 7.89, 7.32, 25.6, 6.42, 4.21, 3.86, 2.92]},
    "spi_gan_table4": {
        "is": [8.93, 9.42, 10.3, 9.65, 9.68, 9.61, 8.58],
        "fid": [14.6, 10.5, 3.09, 8.45, 5.49, 6.25, 20.8],
        "recall": [0.19, 0.60, 0.66, 0.68, 0.67, 0.65, 0.63],
    },
    "spi_gan_table5": {"recall": [0.28, 0.16, 0.43], "coverage": [0.65, 0.58, 0.57]},
    "spi_gan_table8": {"nfe": [1, 1, 1], "fid": [3.09, None, None], "fid-pytorch": [None, 6.62, 6.03]},
    "spi_gan_fig8": {"fid": [3.09, 20.8]},
    "spi_gan_dd_gan": {
        "nfe": [1, None, None, 4],
        "seconds": [None, None, None, 0.21],
        "fid-pytorch": [14.6, None, None, 3.75],
        "is": [8.93, None, None, 9.63],
        "recall@vgg16-fc2": [0.19, None, None, 0.57],
    },
}

D2G = {
    "d2g_table1": {  # the third row is L1, which the paper's table does not have
        "nfe": [1, 1, None, 1, 1, 1, 1],
        "images_per_s": [40.0, 138.4, None, 144.2, 139.9, 127.5, 128.0],
        "batch": [256, 256, None, 256, 256, 256, 2048],
        "fid-clean": [25.94, 110.55, None, 87.60, 67.17, 22.95, 14.72],
        "clip-score": [0.288, 0.222, None, 0.230, 0.244, 0.299, 0.292],
    },
    "d2g_table1_pr": {
        "nfe": [1, 1, None, 1, 1, 1, 1],
        "precision": [0.60, 0.21, None, 0.29, 0.46, 0.62, 0.66],
        "recall": [0.53, 0.33, None, 0.40, 0.54, 0.58, 0.65],
    },
    "d2g_table2": {
        "nfe": [*[1] * 7, None],
        "fid-clean": [14.72, 13.97, 12.04, 11.97, 10.60, 9.58, 9.45, 8.74],
        "clip-score": [0.292, 0.293, 0.300, 0.302, 0.303, 0.308, 0.310, 0.312],
    },
    "d2g_table2_pr": {
        "nfe": [*[1] * 7, None],
        "precision": [0.66, 0.68, 0.70, 0.70, 0.73, 0.72, 0.73, 0.72],
        "recall": [0.65, 0.64, 0.65, 0.65, 0.65, 0.66, 0.65, 0.67],
    },
    "d2g_table3": {
        "nfe": [*NONE * 10, 1],
        "parameters": [5.5e9, 3.0e9, 0.9e9, 0.6e9, 1.0e9, 1.0e9, 0.9e9, 0.9e9, 0.4e9, 0.9e9, 0.9e9],
        "fid-clean": [10.39, 7.27, 8.74, 10.65, 9.09, 13.90, 13.10, 12.78, 11.67, 11.49, 9.29],
        "seconds": [None, 9.1, 2.59, None, 0.13, 0.10, 0.09, 0.09, None, 0.09, 0.09],
    },
    "d2g_table4": {
        "nfe": [25, 4, 8, 1, 1, 1, 1, 50],
        "fid-clean": [20.1, 26.4, 24.2, 23.4, 22.5, 19.7, 19.5, 19.1],
        "clip-score": [0.318, 0.300, 0.300, 0.304, 0.311, 0.326, 0.311, 0.313],
        "seconds": [0.88, 0.21, 0.34, 0.09, 0.09, 0.09, 0.09, 2.59],
    },
    "d2g_table5": {
        "nfe": [1, 1, 1, 50],
        "fid-clean": [28.10, 30.14, 25.49, 25.56],
        "clip-score": [0.342, 0.324, 0.347, 0.346],
        "dreamdiv": [0.232, 0.315, 0.268, 0.338],
        "dreamsim": [0.368, 0.345, 0.284, 0.0],
    },
    "d2g_table6": {
        "nfe": [1] * 6,
        "nfe_total": [819.2e6, 78.6e6, 80.3e6, 83.8e6, 94.3e6, 111.8e6],
        "pairs": [None, 50_000, 100_000, 200_000, 500_000, 1_000_000],  # CD's 50k saved images are no pairs
        "fid": [3.67, 8.51, 5.62, 3.85, 3.25, 3.16],
    },
    "d2g_table7": {"nfe": [None, 1, 1], "a100_days": [183.2, 36.0, 43.6], "fid-clean": [13.10, 15.94, 9.29]},
    "d2g_table_a1": {
        "nfe": [1] * 4,
        "pairs": [3.0e6, 12.0e6, 8.0e6, 1.0e6],
        "nfe_pairs": [150e6, 600e6, 400e6, 35.0e6],
        "nfe_train": [51.2e6, 153.6e6, 97.3e6, 76.8e6],
        "a100_days": [43.6, 119.2, 356.8, 6.0],
        "fid-clean": [9.29, 13.39, None, None],  # the others' are of other images: Tables 5 and 6
    },
    "d2g_table_a2": {"top1": [0.7159, 0.7336, 0.6425, 0.6826]},
    "d2g_table_a3": {
        "2afc-traditional": [0.7336, 0.7429, None, None],
        "2afc-cnn": [0.8220, 0.8199, None, None],
        "2afc-real": [0.6323, 0.6321, None, None],
    },
    "d2g_table_a4": {
        "nfe": [None, 1],
        "a100_days": [4783.0, 43.6],
        "fid-clean": [9.09, 9.29],
        "clip-score": [0.32, 0.31],
    },
    "d2g_table_a4_pr": {"nfe": [None, 1], "precision": [0.74, 0.74], "recall": [0.60, 0.64]},
    "d2g_appendix_d": {"nfe": [1, None, None], "fid": [8.51, None, None]},
    "d2g_lambda_gan": {"nfe": [None, 1, None], "precision": [None, 0.74, None], "recall": [None, 0.64, None]},
    "d2g_elatentlpips": {
        "top1": [0.7336, 0.6826, 0.6991, 0.6991, 0.6890, 0.7110, 0.6618],
        "2afc-traditional": [0.7336, 0.7429, 0.7368, 0.7368, 0.7133, 0.7615, 0.7500],
        "2afc-cnn": [0.8220, 0.8199, 0.8177, 0.8177, 0.8110, 0.8263, 0.8247],
    },
    "d2g_fig4": {"milliseconds": [117, 12.1], "gigabytes": [15.0, 0.6]},
}

GDD = {
    "gdd_table1a": {"nfe": [*NONE * 3, 1, 1, 1], "fid": [*NONE * 3, 4.04, 3.49, 2.21]},  # the first three: no numbers
    "gdd_table1b": {"nfe": [1] * 5, "fid": [2.21, 1.98, 1.77, 1.66, 1.66]},
    "gdd_table2": {"nfe": [1] * 4, "fid": [1.66, 1.54, 1.60, 2.51]},
    "gdd_table3a": {
        "nfe": [1000, 100, 35, 1, 1, 1, 1, 2, 1, 2, 1, 2, 1, 2, *[1] * 5],
        "fid": [3.17, 4.16, 1.98, 2.92, 9.12, 3.78, 3.55, 2.93, 2.83, 2.46, 2.51, 2.24, 1.98, 1.87, 2.62]
        + [2.02, 1.92, 1.66, 1.54],
        "is": [*NONE * 3, 9.82, *NONE * 4, 9.54, 9.80, 9.76, 9.89, *NONE * 3, 10.01, 9.98, 10.11, 10.10],
    },
    "gdd_table3a_cond": {
        "nfe": [2000, 48, 35, 1, 1, 1, 2, 1, 1, 1, 1],
        "fid": [2.20, 2.65, 1.79, 14.73, 2.42, 1.73, 1.63, 1.93, 1.71, 1.58, 1.44],
    },
    "gdd_table3b": {"nfe": [79, 1, 1, 1, 1], "fid": [1.96, 1.62, 1.71, 1.23, 1.31]},
    "gdd_table3c": {"nfe": [79, *[1] * 5], "fid": [2.39, 9.0, 1.71, 1.55, 1.08, 0.85]},
    "gdd_table4": {
        "nfe": [1000, 250, 250, 79, 1, 2, 1, 2, *[1] * 6, 2, 1, 2, *[1] * 5],
        "fid": [1.23, 11.00, 2.07, 2.64, 4.02, 3.20, 3.25, 2.77, 4.06, 1.51, 15.39, 16.3, 7.83, 6.20, 4.70]
        + [1.92, 1.73, 2.62, 2.02, 1.52, 1.42, 1.16],
    },
    "gdd_table4_pr": {
        "nfe": [250, 250, 1, 2, 1, 2, 1, 1, 1, 1, 2, 1, 2, *[1] * 4],
        "precision": [0.67, 0.74, 0.70, 0.73, 0.72, 0.74, 0.79, 0.68, None, 0.68, 0.69, None, None]
        + [0.73, 0.74, 0.77, 0.75],
        "recall": [0.58, 0.63, 0.63, 0.63, 0.63, 0.62, 0.48, 0.36, 0.61, 0.63, 0.64, 0.57, 0.57]
        + [0.63, 0.63, 0.59, 0.60],
    },
    "gdd_table6": {
        "nfe": [1] * 8,
        "batch": [*[256] * 6, 512, 512],
        "fid": [1.66, 1.54, 1.23, 1.31, 1.08, 0.85, 1.42, 1.16],
    },
    "gdd_fig2a": {"nfe": [1, 2, 4, 8, 10], "fid": [1.66, *NONE * 4], "rel-fid": [None, 1.78, *NONE * 3]},
    "gdd_fig2b": {
        "nfe": [None, None, 2, None, None, 1],
        "fid": [*NONE * 5, 1.66],
        "rel-fid": [None, None, 1.78, *NONE * 3],
    },
    "gdd_fig4b": {"nfe": [1, 1, None, None], "fid": [1.66, 1.54, None, None]},
}

EXPECTED = SIDA | SPI_GAN | D2G | GDD
"""Table -> key -> what the paper prints, row after row: read from the papers and their fact sheets, not the tables."""


@pytest.mark.parametrize("table", EXPECTED)
def test_the_numbers_of(table):
    for key, printed in EXPECTED[table].items():
        assert numbers(table, key) == printed, key


def test_no_printed_number_is_without_its_expectation():
    printed = {(table, key) for table in OURS for row in load_table(table).rows for key in row.paper}
    assert printed == {(table, key) for table, keys in EXPECTED.items() for key in keys}


def test_table_8_of_sida_and_its_recipes():
    table = "sida_table8"
    assert [row.about["GB reserved"] for row in rows(table).values()] == (
        ["13.3", "48.0", "31.3", "31.3", "13.4", "48.1", "31.3", "31.3"]
    )
    for row in rows(table).values():  # the recipes have the settings that the table prints
        recipe = load_recipe(row.recipe)
        assert recipe.batch == row.paper["batch"] and recipe.optim.lr == float(row.about["lr"])
        first = 0.9 if row.name == "SiD, FFHQ 64x64" else 0.0  # the authors' script, against the table
        assert recipe.optim.eps == float(row.about["Adam eps"]) and recipe.optim.betas == (first, 0.999)
        assert recipe.ema.half_life == float(row.about["EMA half-life"].rstrip("M")) * 1e6
        size = int(row.about["batch of a GPU"]) * int(row.about["accumulated"])
        assert size * 8 == recipe.batch


def test_table_6_of_gdd_and_its_recipes():
    for row in rows("gdd_table6").values():
        recipe, about = load_recipe(row.recipe), row.about
        assert recipe.batch == row.paper["batch"] and recipe.optim.betas == (0.0, 0.99)
        assert recipe.optim.lr == float(about["lr G"]) and recipe.optim_critic.lr == float(about["lr D"])
        assert recipe.options.r1.gamma == float(about["R1"]) and recipe.student.dropout == 0.0
        assert recipe.ema.half_life == float(about["EMA half-life"].rstrip("M")) * 1e6 and recipe.ema.ramp == 0.05
        assert recipe.images == float(about["images"].rstrip("M")) * 1e6


def test_rows_of_spi_gan_s_first_table():
    table = rows("spi_gan_table1")
    counts = Counter(key for row in table.values() for key in row.paper)
    assert counts == {"fid": 31, "is": 26, "recall": 18, "nfe": 29, "seconds": 16}  # less TransGAN's two doubtful cells
    assert table["Score SDE (VE)"].paper == {"nfe": 2000, "seconds": 423.2, "fid": 2.2, "is": 9.89, "recall": 0.59}
    assert table["LSGM"].paper == {"nfe": 147, "seconds": 44.5, "fid": 2.1, "is": 9.87, "recall": 0.61}
    assert table["SPI-GAN, K = 2"].paper == {"nfe": 1, "seconds": 0.04, "fid": 3.09, "is": 10.3, "recall": 0.66}
    assert table["VAEBM"].paper == {"nfe": 16, "seconds": 8.79, "fid": 12.2, "is": 8.43, "recall": 0.53}


def test_table_8_of_spi_gan_and_its_recipes():
    for row in rows("spi_gan_table8").values():
        recipe, about = load_recipe(row.recipe), row.about
        options = recipe.options
        assert options.ada_target == float(about["ADA target"]) and options.ada_interval == int(about["ADA interval"])
        assert 100 * options.mixing_prob == float(about["mixing, %"])
        assert recipe.network["mapping"]["r_layers"] == int(about["mapping layers"])
        assert options.critic["blocks"] == {"Original": "orig", "Residual": "resnet"}[about["critic"]]
        assert recipe.optim.lr == float(about["lr G"]) and recipe.optim_critic.lr == float(about["lr D"])
        assert recipe.ema.decay == float(about["EMA"]) and options.r1_gamma == float(about["R1"])
        assert options.pl_every == int(about["lazy G"]) and options.r1_every == int(about["lazy D"])
        assert options.pl_weight == float(about["path length"])
    assert [row.about["mapping layers"] for row in rows("spi_gan_table8").values()] == ["1", "7", "7"]


def test_a_time_and_shares_that_are_printed_as_words():
    assert rows("d2g_table3")["MD-UFOGen"].about["seconds, paper"] == "< 0.09"
    assert [row.about["share frozen"] for row in load_table("gdd_table2").rows[1:]] == [
        "85.8 %",
        "2.1 % more",
        "4.0 % more",
    ]


def test_gdd_s_dmd_is_printed_as_it_stands_and_questioned():
    note = " ".join(load_table("gdd_table3a").notes)
    assert "2.62 as printed" in note and "3.77" in note
    assert rows("gdd_table3a")["DMD"].recipe == "dmd_cifar10:uncond"


# ---- what makes the rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", OURS)
def test_every_row_is_made_measured_or_cited_for_a_reason_of_its_own(table):
    reasons = Counter(row.cited for row in load_table(table).rows if row.cited)
    assert all(count == 1 for count in reasons.values()), reasons.most_common(1)
    for row in load_table(table).rows:
        assert row.x or row.cited, row.name
        assert row.cited is None or len(row.cited) > 15, row.name


@pytest.mark.parametrize("table", table_names())
def test_every_recipe_that_a_row_names_is_there(table):
    for row in load_table(table).rows:
        if row.recipe is not None:
            assert is_shipped(row.recipe) and row.recipe in recipe_names(), row.recipe
            assert str(find_recipe(row.recipe).path).endswith(".yaml")


@pytest.mark.parametrize("table", OURS)
def test_the_commands_of_a_head_can_be_typed(table):
    for name, *words in commands(find_table(table).read_text(encoding="utf-8")):
        given = COMMANDS[name].make_context(name, list(words)).params  # what is unknown or missing is refused
        assert given.get("table") in (None, table) or name == "eval"
        if given.get("recipe"):
            swept = [text for text in given["sweep"] if not text.startswith("variant=")]
            plan_sweep(given["recipe"], [], swept) if swept else find_recipe(given["recipe"])
        known = {row.x for row in load_table(table).rows} | {"runs/spi_gan_digits"}
        runs = re.findall(r"runs/[^/\s]+", " ".join(words))
        assert set(runs) <= known | {str(given.get("from_") or given.get("start"))}, runs


@pytest.mark.parametrize("mini", [False, True])
def test_rows_that_set_keys(mini):
    """The sweep of Figure 1: a recipe seven times with another alpha."""
    members = table_members("sida_fig1", [], mini, "there")
    assert [member.recipe.options.alpha for member in members] == [-0.25, 0, 0.5, 0.75, 1, 1.2, 1.5, 1.0]
    assert {member.folder.parent for member in members} == {Path("there")} and len({m.folder for m in members}) == 8
    assert members[7].recipe.options.lambda_sid == 0 and members[0].recipe.images == (6400 if mini else 5_120_000)
    assert members[0].overrides == ("sid.alpha=-0.25",)
    starts = {member.start for member in table_members("sida_fig2", ["images=12800"], mini, "runs")}
    assert starts == {None, Path("runs/sid_cifar10_uncond_a1.2")}


def test_the_command_of_a_row_that_sets_keys(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    row = rows("sida_fig2")["alpha 0.5"]
    command = "d2o finetune sid2a_cifar10:uncond_20k --from runs/sid_cifar10_uncond_a1.2 --set sid.alpha=0.5"
    assert row.command == f"{command} --out runs/sida_fig2_a0.5" and row.command in absent(row)
    assert PaperRow(name="a", x="runs/a", recipe="quickstart", set={"ode.loss": "mse", "compile": True}).command == (
        "d2o train recipes/quickstart.yaml --set ode.loss=mse --set compile=true --out runs/a"
    )


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{name: a, x: digits, set: {images: 8}}", "rows[0].set: there is no recipe that it could change"),
        ("{name: a, x: runs/a, recipe: quickstart, set: {images: [8]}}", "rows[0].set"),
    ],
)
def test_keys_that_cannot_be_set_are_refused(row, problem, tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(f"title: t\npaper: p\nrows:\n  - {row}\n")
    with pytest.raises(UserError, match=re.escape(problem)):
        load_table(path)
    path.write_text("title: t\npaper: p\nrows:\n  - {name: a, x: runs/a, recipe: quickstart, set: {imagess: 8}}\n")
    with pytest.raises(UserError, match="a: --set imagess: unknown key"):
        table_members(str(path), [], False, "runs")
